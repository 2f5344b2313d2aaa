"""The package's annotations are checked while the tests run, sizes of arrays included."""

import pytest
import torch
from support.typechecking import TypeCheckError

from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.numerics import MeasuredError

LOGITS = torch.zeros(2, 5, 7)


def test_sizes_agree_within_a_call_and_not_beyond():
    for pos in (5, 4):
        tokens = torch.zeros(2, pos, dtype=torch.int64)
        assert next_token_loss(LOGITS[:, :pos], tokens).ndim == 0
    with pytest.raises(TypeCheckError):
        next_token_loss(LOGITS, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeCheckError):  # a dtype
        next_token_loss(LOGITS, torch.zeros(2, 5))


def test_types_are_checked_where_nothing_is_an_array():
    with pytest.raises(TypeCheckError):
        NormSite("0", "ln2")
    with pytest.raises(TypeCheckError):
        MeasuredError(0.0, 0.0, torch.float32).require(7)


def test_what_comes_back_is_checked(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda *_, **__: 0.0)
    with pytest.raises(TypeCheckError):
        next_token_loss(LOGITS, torch.zeros(2, 5, dtype=torch.int64))
