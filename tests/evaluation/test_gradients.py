"""Gradient balance against `backward`, in a run and outside of one."""

import copy
from dataclasses import replace

import pytest
import torch
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.errors import DataError
from lnfree_interp.models.loss import next_token_loss


@pytest.fixture
def small(gpt2_folder):
    return lf.load(gpt2_folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_sizes_are_those_of_backward(kind):
    model = live_model(kind)
    tokens = torch.randint(model.cfg.d_vocab, (5, 12), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    found = lf.gradient_balance(model, tokens, batch=2)
    assert not any(W.requires_grad or W.grad is not None for W in model.parameters())
    own = copy.deepcopy(model).requires_grad_(True)
    next_token_loss(own(tokens, prepend_bos=False), tokens).backward()
    for layer, block in enumerate(own.blocks):
        for name, W in block.named_parameters():
            if ".W_" in name or "._W_" in name:
                size = found.by_kind[name.replace("._", ".")][layer].item()
                assert size == pytest.approx(W.grad.abs().mean().item(), rel=1e-9)
    one = lf.gradient_balance(model, tokens, batch=5)
    torch.testing.assert_close(found.by_kind, one.by_kind)


def test_a_run_measures_the_same_as_the_call(small):
    data = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(3))
    recipe = lf.recipes.from_scratch(steps=3, batch=4)  # every batch is all of the text
    recipe = replace(recipe, precision="float32")
    run = lf.train(small, recipe, data, progress=False, log_every=2)
    assert [bool(record.probes) for record in run.history] == [True, False, True]
    first = lf.GradientBalance.of_run(run.history[:1])
    called = lf.gradient_balance(lf.with_norm_sites(small), data)
    assert list(first.by_kind) == [f"attn.W_{x}" for x in "QKVO"] + ["mlp.W_in", "mlp.W_out"]
    for kind, sizes in called.by_kind.items():
        torch.testing.assert_close(first.by_kind[kind], sizes, rtol=1e-4, atol=0)
    both = lf.GradientBalance.of_run(run)
    last = lf.GradientBalance.of_run(run, from_step=1)
    torch.testing.assert_close(
        both.by_kind["mlp.W_in"], (first.by_kind["mlp.W_in"] + last.by_kind["mlp.W_in"]) / 2
    )


def test_it_is_measured_before_clipping(small):
    data = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(3))
    sizes = []
    for clip in (1e-6, 1e6):
        recipe = lf.recipes.from_scratch(steps=1, batch=4)
        run = lf.train(small, replace(recipe, clip=clip), data, progress=False, log_every=1)
        sizes.append(lf.GradientBalance.of_run(run).by_kind["attn.W_V"])
    torch.testing.assert_close(*sizes)


def test_frame_ratio_and_figure(live, tokens):
    balance = lf.gradient_balance(live, tokens)
    frame = balance.to_frame()
    assert frame.shape == (3, 6)
    ratio = frame["mlp.W_out"][0] / frame["mlp.W_out"][2]
    assert balance.first_over_last["mlp.W_out"] == pytest.approx(ratio)
    assert f"mlp.W_out {ratio:.3g}" in repr(balance)
    figure = lf.plots.gradient_balance({"a": balance, "b": balance}, kinds=["mlp.W_out"])
    assert [list(line.y) for line in figure.data] == [frame["mlp.W_out"].tolist()] * 2
    assert len(lf.plots.gradient_balance(balance).data) == 6


def test_what_has_no_gradients_is_refused(small, tokens):
    data = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(3))
    recipe = lf.recipes.from_scratch(steps=2, batch=2)
    run = lf.train(small, recipe, data, progress=False, log_every=0)
    with pytest.raises(DataError, match="log_every above 0"):
        lf.GradientBalance.of_run(run)
    balance = lf.gradient_balance(small, tokens)
    with pytest.raises(DataError, match=r"of the kind W_in: give some of \['attn"):
        lf.plots.gradient_balance(balance, ["W_in"])
    with pytest.raises(DataError, match="nothing to draw"):
        lf.plots.gradient_balance(balance, [])
