"""The measured error stays with the model, and what cannot be compared is named."""

import copy

import pytest
import torch
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.errors import InexactError


def test_a_made_model_keeps_its_measured_error(live, frozen, folded):
    conversion = lf.to_rms(live)
    narrow = lf.to_crms(live, "drop")
    made = {
        "fold": lf.fold(frozen),
        "frozen form": lf.frozen_form(folded),
        "sites": lf.with_norm_sites(live),
        "rms": conversion.model,
        "crms": narrow.model,
        "load": live,
    }
    for name, model in made.items():
        error = lf.measured_agreement(model)
        assert error is not None, name
        assert 0 <= error.relative < 1e-5
        assert error.dtype == live.cfg.dtype
        assert lf.measured_agreement(copy.deepcopy(model)) == error
    assert lf.measured_agreement(conversion.model) == conversion.error
    assert lf.measured_agreement(narrow.model) == narrow.error
    assert lf.measured_agreement(made["fold"]) == lf.compare_logits(made["fold"], frozen)


def test_a_model_that_was_not_compared_has_no_error(gpt2_folder):
    assert lf.measured_agreement(lf.load(gpt2_folder, check=False)) is None


def test_a_folder_in_our_layout_is_compared_too(folded, tmp_path):
    folder = lf.export(folded, tmp_path / "out", target="transformer_lens")
    assert lf.measured_agreement(lf.load(folder, dtype=folded.cfg.dtype)).absolute == 0.0
    assert lf.measured_agreement(lf.load(folder, check=False)) is None
    changed = lf.load(folder, form="frozen", dtype=folded.cfg.dtype)
    assert lf.measured_agreement(changed) == lf.compare_logits(changed, folded)


def test_logits_that_are_not_numbers_are_named(live):
    frozen = freeze_all(live)
    with torch.no_grad():
        frozen.blocks[1].mlp.W_out[3, 4] = torch.nan
    match = r"not finite.*blocks\.1\.hook_mlp_out.*weight blocks\.1\.mlp\.W_out"
    for make in (lf.fold, lf.frozen_form):
        with pytest.raises(InexactError, match=match):
            make(frozen)
    with torch.no_grad():
        live.blocks[1].mlp.W_out[3, 4] = torch.nan
    for make in (lf.with_norm_sites, lf.to_rms):
        with pytest.raises(InexactError, match=r"blocks\.1"):
            make(live)


def test_overflow_is_named_as_such(live):
    frozen = freeze_all(live).float()
    with torch.no_grad():
        frozen.blocks[1].mlp.W_in.mul_(1e30)
    with pytest.raises(InexactError, match=r"overflow.*float64"):
        lf.fold(frozen)
