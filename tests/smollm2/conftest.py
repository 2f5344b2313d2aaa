"""SmolLM2-135M-Instruct, loaded once. Every test here is marked `smollm2`: `make test-smollm2`."""

import pytest

import lnfree_interp as lf
from lnfree_interp.checkpoints.loading import load_checkpoint


@pytest.fixture(scope="session")
def loaded():
    """The model as `load` gives it, in float32, with its format and its measured error."""
    return load_checkpoint(lf.smollm2(), device="cpu")


@pytest.fixture(scope="session")
def smollm2(loaded):
    """The model, for all tests: none may change it."""
    return loaded.model
