"""Weights of one architecture as the start of another: every tensor once, identities exact."""

from dataclasses import replace

import pytest
import torch
from support.architectures import ALL, make_model
from support.loaded import frozen_model, live_model

import lnfree_interp as lf
from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.models.sites import stock_weights
from lnfree_interp.tuning import transfer as module
from lnfree_interp.tuning.transfer import (
    CENTRED,
    FACTOR,
    POSITIONS,
    REPEATED,
    TIED,
    transfer_weights,
)


def loaded(kind, seed=5, **settings):
    """Another random model of the same architecture."""
    return lf.load(make_model(kind, seed, **settings), dtype=torch.float64, check=False)


def names(transfer, category):
    return {one.name for one in transfer.of(category)}


def check_partition(transfer, source, target):
    """Every tensor of the target has one category; every one of the source is used or dropped."""
    ours, theirs = module._own(target), module._own(source)
    kept = [one for one in transfer.tensors if one.category != "dropped"]
    assert [one.name for one in kept] == list(ours)
    used = {name for one in kept for name in one.source}
    dropped = names(transfer, "dropped")
    assert used | dropped == set(theirs)
    assert not used & dropped
    assert sum(one.entries for one in kept) == sum(W.numel() for W in ours.values())
    after = stock_weights(transfer.model)
    for one in transfer.of("copied"):
        assert torch.equal(after[one.name], theirs[one.source[0]]), one
    for one in transfer.of("initialised"):
        assert torch.equal(after[one.name], ours[one.name]), one
        assert one.how
        assert one.source == ()
    for one in transfer.of("transformed"):
        assert one.how
        assert one.source


@ALL
def test_the_same_architecture_takes_every_tensor(kind):
    source, target = live_model(kind), loaded(kind)
    before = {name: W.clone() for name, W in stock_weights(target).items()}
    transfer = transfer_weights(source, target)
    check_partition(transfer, source, target)
    assert not names(transfer, "initialised") | names(transfer, "transformed")
    assert transfer.error.absolute == 0
    assert all(torch.equal(W, before[name]) for name, W in stock_weights(target).items())
    assert transfer.fresh.count == 0


@ALL
def test_a_variant_of_it_keeps_what_is_new_as_it_was(kind):
    source = live_model(kind)
    if source.cfg.use_normalization_before_and_after:
        made = lf.to_dyt(loaded(kind))
        new = {str(site) + ".map.alpha" for site in lf.list_norm_sites(made.model)}
        new = {name.replace("ln1.qk", "ln1").replace("ln1.v", "ln1") for name in new}
    else:
        made = lf.to_sub_ln(loaded(kind))
        new = {f"blocks.{i}.{at}.inner" for i in range(3) for at in ("attn", "mlp")}
        bias = "b" if source.cfg.normalization_type == "LN" else "w"
        new = {f"{name}.{leaf}" for name in new for leaf in {"w", bias}}
    transfer = transfer_weights(source, made.model)
    check_partition(transfer, source, made.model)
    assert names(transfer, "initialised") == new
    assert set(transfer.fresh.chosen) == new


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "neox", "neo", "opt"])
def test_layernorm_becomes_rmsnorm(kind, bias):
    source = live_model(kind, tie_word_embeddings=False)
    target = lf.to_map(loaded(kind, tie_word_embeddings=False), "RMSNorm", bias=bias).model
    transfer = transfer_weights(source, target)
    check_partition(transfer, source, target)
    transfer.error.require("LayerNorm as RMSNorm", 1e-12)
    assert {one.how for one in transfer.of("transformed")} == {CENTRED}
    assert ("blocks.1.ln2.w" in names(transfer, "copied")) is True
    assert ("blocks.1.ln2.b" in names(transfer, "copied")) is bias
    assert not names(transfer, "dropped")


def test_centring_that_is_left_out_is_noticed(monkeypatch):
    source = live_model("gpt2", tie_word_embeddings=False)
    target = lf.to_map(loaded("gpt2", tie_word_embeddings=False), "RMSNorm", bias=False).model
    monkeypatch.setattr(module, "writes_to_stream", lambda name: name == "embed.W_E")
    assert transfer_weights(source, target).error.relative > 1e-3


def test_a_tied_unembedding_is_not_centred():
    source = live_model("gpt2")
    target = lf.to_map(live_model("gpt2"), "RMSNorm", bias=False).model
    assert "unembed.W_U" not in module._own(lf.with_norm_sites(source))
    transfer = transfer_weights(source, target)
    check_partition(transfer, source, target)
    assert not names(transfer, "transformed")
    assert "blocks.0.ln1.b" in names(transfer, "dropped")
    assert transfer.error.relative > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_a_factor_goes_into_gain_and_bias(kind, monkeypatch):
    source = live_model(kind)
    target = lf.to_layernorm_scaling(loaded(kind), keep_function=False).model
    transfer = transfer_weights(source, target)
    check_partition(transfer, source, target)
    transfer.error.require("LayerNorm Scaling", 1e-12)
    changed = {one.name for one in transfer.of("transformed") if one.how == FACTOR}
    leaves = ("w", "b") if kind == "gpt2" else ("w",)
    assert changed == {
        f"blocks.{i}.{norm}.{leaf}" for i in (1, 2) for norm in ("ln1", "ln2") for leaf in leaves
    }
    back = transfer_weights(transfer.model, source)
    back.error.require("and back", 1e-12)
    monkeypatch.setattr(module, "_factors", lambda model: {})
    assert transfer_weights(source, target).error.relative > 1e-3


@pytest.mark.parametrize("heads", [2, 4])
def test_shared_keys_and_values_are_repeated(heads):
    source = live_model("llama-grouped", num_key_value_heads=1 if heads == 2 else 2)
    target = loaded("llama-grouped", num_key_value_heads=heads)
    transfer = transfer_weights(source, target)
    check_partition(transfer, source, target)
    transfer.error.require("repeated", 1e-12)
    changed = {one.name.rpartition(".")[2] for one in transfer.of("transformed")}
    given = "" if target.cfg.n_key_value_heads is None else "_"
    assert changed == {f"{given}{leaf}" for leaf in ("W_K", "W_V", "b_K", "b_V")}
    assert {one.how for one in transfer.of("transformed")} == {REPEATED}
    other = transfer_weights(target, source)  # fewer heads are no identity
    check_partition(other, target, source)
    assert all("shape" in one.how or "no such" in one.how for one in other.of("initialised"))


def test_positions_beyond_the_target_are_cut_off():
    source, target = live_model("gpt2"), loaded("gpt2", n_positions=32)
    transfer = transfer_weights(source, target)
    check_partition(transfer, source, target)
    assert [one.how for one in transfer.of("transformed")] == [POSITIONS]
    tokens = torch.arange(30)[None]
    assert torch.equal(transfer.model(tokens), source(tokens))
    longer = transfer_weights(target, source)
    assert names(longer, "initialised") == {"pos_embed.W_pos"}


def test_layers_are_taken_as_they_are_named():
    source, target = live_model("gpt2"), loaded("gpt2", n_layer=4)
    first = transfer_weights(source, target)
    check_partition(first, source, target)
    assert {one.how for one in first.of("initialised")} == {"a layer that the source does not have"}
    assert all(name.startswith("blocks.3.") for name in names(first, "initialised"))
    chosen = transfer_weights(source, target, layers={0: 2, 1: 0, 3: 2})
    check_partition(chosen, source, target)
    after = stock_weights(chosen.model)
    for here, there in ((0, 2), (1, 0), (3, 2)):
        assert torch.equal(after[f"blocks.{here}.attn.W_Q"], source.W_Q[there])
    assert all(name.startswith("blocks.2.") for name in names(chosen, "initialised"))
    assert all(name.startswith("blocks.1.") for name in names(chosen, "dropped"))
    for wrong in ({4: 0}, {0: 3}, {-1: 0}):
        with pytest.raises(DataError, match="the target has layers 0 to 3, the source 0 to 2"):
            transfer_weights(source, target, layers=wrong)


def test_linear_attention_takes_the_projections_or_leaves_them():
    source = live_model("gpt2")
    target = lf.to_linear_attention(loaded("gpt2"), [0, 2]).model
    transfer = transfer_weights(source, target)
    check_partition(transfer, source, target)
    assert not transfer.fresh.count
    own = lf.to_linear_attention(source, [0, 2])
    assert transfer.error.absolute == pytest.approx(own.error.absolute, rel=1e-9)
    left = transfer_weights(source, target, leave=["blocks.[02].attn.[Wb]_[QK]"])
    check_partition(left, source, target)
    assert names(left, "initialised") == {
        f"blocks.{i}.attn.{leaf}_{of}" for i in (0, 2) for leaf in "Wb" for of in "QK"
    }
    assert "another" not in str(left)
    assert "8 tensors" in str(left)
    assert "left as it was" in str(left)
    assert left.to_frame().shape == (len(left.tensors), 5)
    with pytest.raises(DataError, match=r"no parameter of the target is called 'blocks\.7\.\*'"):
        transfer_weights(source, target, leave=["blocks.7.*"])
    with pytest.raises(DataError, match="category='new' does not exist"):
        left.of("new")


def test_what_is_fresh_is_trained_first_and_the_rest_is_released_when_the_loss_stands_still():
    source = live_model("gpt2", torch.float32)
    target = lf.to_linear_attention(
        lf.load(make_model("gpt2", 5), dtype=torch.float32, check=False), [0, 2]
    ).model
    transfer = transfer_weights(source, target, leave=["blocks.[02].attn.*"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(300, (16, 12), generator=generator)
    still = lf.Release(trainable="all", window=2, less_than=0.0)
    recipe = replace(
        lf.recipes.finetuning(batch=2), steps=12, lr=1e-4, warmup=0, trainable=transfer.fresh,
        release=(still,),
    )  # fmt: skip
    run = lf.finetune(transfer.model, recipe, tokens, progress=False)
    losses = [record.loss for record in run.history]
    due = next(s for s in range(1, 13) if still.due(s, losses[:s]))
    assert [record.step for record in run.history if record.released] == [due - 1]
    early = replace(recipe, steps=due, release=())
    before = stock_weights(lf.finetune(transfer.model, early, tokens, progress=False).model)
    given = stock_weights(transfer.model)
    for name, W in before.items():
        fresh = name in transfer.fresh.chosen
        assert torch.equal(W, given[name]) != (fresh and bool(W.any())), name
    after = stock_weights(run.model)
    assert not torch.equal(after["blocks.1.attn.W_Q"], given["blocks.1.attn.W_Q"])


def test_models_that_have_nothing_in_common_are_refused():
    with pytest.raises(UnsupportedModelError, match="no tensor of the source fits the target"):
        transfer_weights(
            live_model("gpt2"), live_model("gpt2", n_embd=16, n_head=2, n_layer=1, vocab_size=100)
        )


def test_another_vocabulary_is_not_compared_and_a_frozen_source_is_taken_as_it_is():
    transfer = transfer_weights(live_model("gpt2"), loaded("gpt2", vocab_size=200))
    assert transfer.error is None
    assert "not compared" in str(transfer)
    assert {"embed.W_E", "unembed.W_U", "unembed.b_U"} <= names(transfer, "initialised")
    frozen = transfer_weights(frozen_model("gpt2"), loaded("gpt2"))
    assert {one.how for one in frozen.of("transformed")} == {TIED}
