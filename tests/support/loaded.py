"""Small random models as `lf.load` gives them: made once in a process, copied for each test."""

import copy
import functools

import torch

import lnfree_interp as lf
from support.architectures import make_model
from support.models import freeze_all, make_tokenizer


def live_model(kind, dtype=torch.float64, **settings):
    """With all of its norms."""
    return _copy(_live(kind, dtype, **settings))


def frozen_model(kind, dtype=torch.float64, **settings):
    """With norm sites, all frozen."""
    return _copy(_frozen(kind, dtype, **settings))


def folded_model(kind, dtype=torch.float64, **settings):
    """Without norms."""
    return _copy(_folded(kind, dtype, **settings))


def _copy(model):
    torch.manual_seed(0)  # what a test draws does not depend on which test was the first
    return copy.deepcopy(model)


@functools.lru_cache(maxsize=32)
def _live(kind, dtype, tokenizer=False, **settings):
    given = make_tokenizer() if tokenizer else None
    return lf.load(make_model(kind, **settings), tokenizer=given, dtype=dtype, check=False)


@functools.lru_cache(maxsize=32)
def _frozen(*about, **settings):
    return freeze_all(_live(*about, **settings))


@functools.lru_cache(maxsize=32)
def _folded(*about, **settings):
    return lf.fold(_frozen(*about, **settings))
