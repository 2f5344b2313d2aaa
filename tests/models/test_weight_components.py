"""Components of weights: every parameter in exactly one of them."""

import pytest
import torch
from support.architectures import ALL
from support.loaded import folded_model, frozen_model, live_model

import lnfree_interp as lf
from lnfree_interp.models.sites import stock_weights


def require_partition(model):
    weights = stock_weights(model)
    times = {name: torch.zeros(W.shape, dtype=torch.int) for name, W in weights.items()}
    components = lf.list_weight_components(model)
    for component in components:
        for part in component.of(times):
            part += 1
    assert all((count == 1).all() for count in times.values())
    assert len({component.name for component in components}) == len(components)
    return components


@ALL
@pytest.mark.parametrize("form", [live_model, frozen_model, folded_model])
def test_every_parameter_is_in_one_component(kind, form):
    require_partition(form(kind, torch.float32))


@pytest.mark.parametrize(
    "variant",
    [lf.to_normformer, lf.to_sub_ln, lf.to_peri_ln, lf.to_dyt, lf.to_derf, lf.to_layernorm_scaling,
     lf.to_rms, lf.to_crms],
)  # fmt: skip
def test_those_of_variants_too(variant):
    require_partition(variant(live_model("gpt2", torch.float32)).model)


def test_components_are_those_of_the_names():
    model = live_model("llama-grouped")
    found = {component.name: component for component in lf.list_weight_components(model)}
    weights = stock_weights(model)
    (W_Q, W_O) = (W for W in found["L1H3"].of(weights) if W.ndim == 2)
    assert {tuple(W_Q.shape), tuple(W_O.shape)} == {(32, 12), (12, 32)}
    torch.testing.assert_close(
        sorted([W_Q.sum(), W_O.sum()]), sorted([model.W_Q[1, 3].sum(), model.W_O[1, 3].sum()])
    )
    assert found["L1H3"].kind == "head"
    assert found["L1KV1"].kind == "kv_head"
    assert "L1KV2" not in found  # two groups of two heads
    shared = {name for name, _ in found["L1KV1"].parts}
    assert {"blocks.1.attn._W_K", "blocks.1.attn._W_V"} <= shared
    assert (found["blocks.1.ln2"].kind, found["blocks.1.ln2"].layer) == ("ln2", 1)
    assert (found["ln_final"].kind, found["ln_final"].layer) == ("ln_final", None)
    assert {name for name, _ in found["blocks.2.mlp"].parts} >= {"blocks.2.mlp.W_gate"}
