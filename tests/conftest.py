"""Fixtures: small random models in which every term counts."""

import os

# Before any import of huggingface_hub: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from support.models import freeze_all, make_gpt2, make_tokenizer

import lnfree_interp as lf


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory, tokenizer):
    """A random GPT-2 in the real format, written by the real writer."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.fixture
def live(gpt2_folder, dtype):
    """A stock LayerNorm model."""
    return lf.load(gpt2_folder, dtype=dtype)


@pytest.fixture
def frozen(live):
    return freeze_all(live)


@pytest.fixture
def folded(frozen):
    return lf.fold(frozen)


@pytest.fixture
def tokens():
    return torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(1))
