"""Questions about scores where queries and keys pass norms of their own (Qwen3): by hand."""

from types import SimpleNamespace

import pytest
import torch
from support.loaded import live_model
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.analysis.bridge import BridgeView
from lnfree_interp.errors import HeldWarning, InexactError, UnsupportedModelError

LAYER, HEAD = 1, 3
TOKENS = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(5))
READS = [f"blocks.{LAYER}.ln1.qk", f"blocks.{LAYER}.attn.q_norm", f"blocks.{LAYER}.attn.k_norm"]


def live():
    return live_model("qwen3")


@pytest.fixture
def frozen():
    """With norm sites, every one frozen, none merged."""
    return freeze_all(live())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_scores_are_those_of_the_model_in_which_the_norms_are_merged(frozen):
    merged = lf.fold(frozen)
    for one in TOKENS:
        ours, theirs = (lf.attribute_scores(m, one, LAYER, HEAD).verify() for m in (frozen, merged))
        assert set(ours.query_components) == set(theirs.query_components)
        order = [theirs.query_components.index(c) for c in ours.query_components]
        keys = [theirs.key_components.index(c) for c in ours.key_components]
        close(ours.values, theirs.values[order][:, keys])


@pytest.mark.parametrize("side", ["query", "key"])
def test_a_share_is_what_the_score_loses(frozen, side):
    """The model's own block without what L0H2 wrote, at one side and nowhere else."""
    query, key = 7, 4
    target = lf.Score(LAYER, HEAD, query, key, side=side)
    found = lf.trace(frozen, TOKENS).attribute(target, by="head").verify()
    names = ["blocks.0.attn.hook_z", f"blocks.{LAYER}.hook_resid_pre"]
    names += [f"blocks.{LAYER}.attn.hook_rot_{x}" for x in "qk"]
    names.append(f"blocks.{LAYER}.attn.hook_attn_scores")
    _, cache = frozen.run_with_cache(TOKENS, names_filter=names)
    stream = cache[names[1]].clone()
    at = query if side == "query" else key
    stream[:, at] -= (cache[names[0]][:, at, 2] @ frozen.W_O[0, 2]).detach()
    other = names[3] if side == "query" else names[2]
    hooks = [(other, lambda x, hook: cache[other]), (names[4], lambda x, hook: seen.append(x))]
    seen = []
    with frozen.hooks(hooks):
        frozen(stream, start_at_layer=LAYER, stop_at_layer=LAYER + 1)
    lost = (cache[names[4]] - seen[0])[:, HEAD, query, key]
    close(found["L0H2"], lost.detach())


@pytest.mark.parametrize("sites", [False, True])
def test_live_norms_are_held_at_the_scales_that_they_had(sites):
    """With TransformerLens' own norms, which see batch, position and head as one, and with ours."""
    stock = live()
    model = lf.with_norm_sites(stock) if sites else stock
    whole = lf.trace(model, TOKENS, hold=True)
    with pytest.warns(HeldWarning, match="held"):
        found = lf.attribute_scores(whole, LAYER, HEAD).verify()
    assert set(found.held) == set(READS)
    assert found.gap is not None
    assert found.gap.relative > 0.01
    _, cache = stock.run_with_cache(TOKENS)
    block, n_kv = stock.blocks[LAYER], stock.cfg.n_key_value_heads
    embed = cache["hook_embed"] / cache[f"blocks.{LAYER}.ln1.hook_scale"] * block.ln1.w
    sides = {}
    for x, head, n in (("q", HEAD, stock.cfg.n_heads), ("k", HEAD * n_kv // 4, n_kv)):
        W = block.attn.W_Q if x == "q" else block.attn._W_K
        norm = getattr(block.attn, f"{x}_norm")
        scale = cache[f"blocks.{LAYER}.attn.{x}_norm.hook_scale"].view(*TOKENS.shape, n, 1)
        part = (embed @ W[head]) / scale[:, :, head] * norm.w
        sides[x] = block.attn.apply_rotary(part[:, :, None])[:, :, 0]
    expected = (sides["q"][:, -1, None] * sides["k"]).sum(-1) / block.attn.attn_scale
    close(found["embed", "embed"], expected.detach())
    for i in range(len(TOKENS)):
        with pytest.warns(HeldWarning):
            one = lf.attribute_scores(whole.select(i), LAYER, HEAD).verify()
        close(one.values, found.select(prompt=i).values)


def test_a_question_reads_through_the_norms_of_its_own_side():
    model = live()

    def read(question):
        return [str(site) for site in lf.norms_read(model, TOKENS, question)]

    assert set(read(lambda one: lf.attribute_scores(one, LAYER, HEAD))) == set(READS)
    for side, others in (("query", "k_norm"), ("key", "q_norm")):
        expected = [name for name in READS if not name.endswith(others)]
        assert set(read(lf.Score(LAYER, HEAD, side=side))) == set(expected)
    frozen = lf.freeze_for(model, lf.Score(LAYER, HEAD, side="key"), TOKENS, progress=False).model
    target = lf.Score(LAYER, HEAD, key=2, side="key")
    lf.trace(frozen, TOKENS).attribute(target, by="sublayer").verify()
    with pytest.raises(InexactError, match="q_norm is not affine"):
        lf.attribute_scores(frozen, TOKENS, LAYER, HEAD)


def test_a_pattern_without_a_component(frozen):
    for side in ("both", "query", "key"):
        found = lf.counterfactual_pattern(
            frozen, TOKENS[0], LAYER, HEAD, without="L0H2", side=side
        ).verify()
        expected = lf.counterfactual_pattern(
            lf.fold(frozen), TOKENS[0], LAYER, HEAD, without="L0H2", side=side
        )
        close(found.pattern, expected.pattern)


def test_weights_are_read_through_them(frozen):
    merged = lf.fold(frozen)
    for which in "QKV":
        ours, theirs = (lf.virtual_weights(m, "L0H2", "L1H3", which).AB for m in (frozen, merged))
        close(ours, theirs)
    tables = [lf.qk_table(m, LAYER, HEAD, offset=2).row(7) for m in (frozen, merged)]
    close(*tables)
    lf.freeze_site(frozen, "blocks.1.attn.q_norm", 2.0)
    assert not torch.allclose(lf.qk_table(frozen, LAYER, HEAD, offset=2).row(7), tables[0])
    lf.get_norm(frozen, "blocks.1.attn.q_norm").thaw()
    with pytest.raises(InexactError, match=r"blocks\.1\.attn\.q_norm depends on the input"):
        lf.qk_table(frozen, LAYER, HEAD, offset=2)
    lf.ov_table(frozen, LAYER, HEAD)  # values pass no such norm
    lf.virtual_weights(frozen, "L0H2", "L1H3", "V")


def test_deletions_are_predicted_once_they_are_frozen(frozen):
    call = {"heads": "L1H3", "k": (1, 2), "draws": 1, "progress": False}
    check = lf.deletion_check(frozen, TOKENS, **call)
    assert check.held == ()
    assert check.certificate.error.relative < 1e-9
    held = lf.deletion_check(live(), TOKENS, **call)
    assert set(READS) < set(held.held)
    assert held.certificate.error.relative > 0.01


def test_a_bridge_refuses_them_by_name():
    """A view alone: a bridge needs another TransformerLens."""
    view = object.__new__(BridgeView)
    view.cfg = SimpleNamespace(use_qk_norm=True)
    assert not view.explains_scores
    with pytest.raises(UnsupportedModelError, match="norms of their own"):
        view.qk_norm(0, "query")
    view.cfg = SimpleNamespace()
    assert view.explains_scores
    assert view.qk_norm(0, "query") is None
