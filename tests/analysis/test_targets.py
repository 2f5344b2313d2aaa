"""Every target on every architecture, against brute force from the model's own activations."""

from dataclasses import dataclass, replace

import pytest
import torch
from support.loaded import folded_model, frozen_model, live_model

import lnfree_interp as lf
from lnfree_interp.analysis.targets import read_at
from lnfree_interp.analysis.view import view_of
from lnfree_interp.errors import DataError, HeldWarning, InexactError

KINDS = ["gpt2", "neox", "llama-grouped", "qwen3", "gemma2-no-caps", "mistral"]
ROWS = [[11, 12, 13, 14, 15, 16], [21, 22, 23, 24]]  # within every window
LAYER, HEAD = 2, 1


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.fixture(params=KINDS)
def model(request):
    return folded_model(request.param)


def one_prompt(model, row=0):
    """Activations of one prompt, by TransformerLens alone."""
    logits, cache = model.run_with_cache(torch.tensor([ROWS[row]]))
    return logits[0], cache


def vectors(cache, place, pos):
    """What adds up to the stream at a place, at the sublayer level, from activations alone."""
    layer, mid = int(place.split(".")[1]), place.endswith("mid")
    found = {"embed": cache["hook_embed"][0, pos]}
    if "hook_pos_embed" in cache:
        found["pos_embed"] = cache["hook_pos_embed"][0, pos]
    for i in range(layer + mid + place.endswith("post")):
        found[f"{i}_attn_out"] = cache["attn_out", i][0, pos]
        if not (mid and i == layer):
            found[f"{i}_mlp_out"] = cache["mlp_out", i][0, pos]
    return found


def checked(model, target, place, pos, read, constants, total):
    """A target, for both prompts in a batch and by hand: parts that are read along a direction."""
    trace = lf.trace(model, ROWS)
    found = trace.attribute(target, by="sublayer").verify(1e-10)
    for row in range(len(ROWS)):
        one = found.select(row)
        _, cache = one_prompt(model, row)
        expected = {
            label: read(row, cache, x) for label, x in vectors(cache, place, pos).items()
        } | constants(row, cache)
        assert set(one.labels) == set(expected)
        for label, value in expected.items():
            close(one[label], torch.as_tensor(value, dtype=torch.float64))
        close(one.total, total(row, cache))
    heads = trace.attribute(target, by="head").verify(1e-10)
    for layer in range(len(heads.of_kind("mlp_out"))):
        heads_of = [v for c, v in heads if c.kind in ("head", "b_O") and c.layer == layer]
        close(sum(heads_of), found[f"{layer}_attn_out"])
    for by in ("layer", "source", "neuron"):
        close(trace.attribute(target, by=by).verify(1e-10).total, found.total)


def test_logit(model):
    checked(
        model, lf.Logit(7, pos=-2), "blocks.2.hook_resid_post", -2,
        lambda row, cache, x: x @ model.W_U[:, 7],
        lambda row, cache: {"b_U": model.b_U[7]},
        lambda row, cache: one_prompt(model, row)[0][-2, 7],
    )  # fmt: skip


def test_logit_difference(model):
    answers, foils = [7, 8], [9, 10]
    checked(
        model, lf.LogitDifference(answers, foils), "blocks.2.hook_resid_post", -1,
        lambda row, cache, x: x @ (model.W_U[:, answers[row]] - model.W_U[:, foils[row]]),
        lambda row, cache: {"b_U": model.b_U[answers[row]] - model.b_U[foils[row]]},
        lambda row, cache: one_prompt(model, row)[0][-1, answers[row]]
        - one_prompt(model, row)[0][-1, foils[row]],
    )  # fmt: skip


def test_next_tokens(model):
    tokens = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(4))
    found = lf.trace(model, tokens).attribute(lf.NextTokens(), by="sublayer").verify(1e-10)
    logits, cache = model.run_with_cache(tokens)
    close(found.total, logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0])
    directions = model.W_U.T[tokens[:, 1:]]
    close(found["1_mlp_out"], (cache["mlp_out", 1][:, :-1] * directions).sum(-1))
    close(found["embed"], (cache["hook_embed"][:, :-1] * directions).sum(-1))
    close(found["b_U"], model.b_U[tokens[:, 1:]])


def met(model, cache, which):
    """Queries or keys of the head as they meet, and its index among grouped ones."""
    rotated = f"blocks.{LAYER}.attn.hook_rot_{which}"
    x = cache[rotated if rotated in cache else f"blocks.{LAYER}.attn.hook_{which}"][0]
    return x[:, HEAD * x.shape[1] // model.cfg.n_heads]


def turned(model, x, pos, n):
    """A query or key at a position, rotated by the model's own rotation where it has one."""
    if model.cfg.positional_embedding_type != "rotary":
        return x
    attn, everywhere = model.blocks[LAYER].attn, x.expand(1, n, 1, len(x))
    return attn.apply_rotary(everywhere.contiguous())[0, pos, 0]


def side_read(model, side, n_of, query, key):
    """How parts at one side meet what is at the other, and what the side's bias adds."""
    attn = model.blocks[LAYER].attn
    W, b = (attn.W_Q, attn.b_Q) if side == "query" else (attn.W_K, attn.b_K)
    here, there = (query, key) if side == "query" else (key, query)

    def read(row, cache, x):
        other = met(model, cache, "k" if side == "query" else "q")[there(row)]
        return turned(model, x @ W[HEAD], here(row), n_of(row)) @ other / attn.attn_scale

    def bias(row, cache):
        other = met(model, cache, "k" if side == "query" else "q")[there(row)]
        return turned(model, b[HEAD], here(row), n_of(row)) @ other / attn.attn_scale

    return read, bias


@pytest.mark.parametrize("side", ["query", "key"])
def test_score_at_one_side(model, side):
    n_of = [len(row) for row in ROWS].__getitem__
    read, bias = side_read(model, side, n_of, lambda row: n_of(row) - 1, lambda row: 1)
    checked(
        model, lf.Score(LAYER, HEAD, key=1, side=side), f"blocks.{LAYER}.hook_resid_pre",
        -1 if side == "query" else 1, read,
        lambda row, cache: {"b_Q" if side == "query" else "b_K": bias(row, cache)},
        lambda row, cache: cache["attn_scores", LAYER][0, HEAD, -1, 1],
    )  # fmt: skip


@pytest.mark.parametrize("by", ["sublayer", "head", "source", "neuron"])
def test_the_sides_and_the_pairs_of_a_score_are_one_sum(model, by):
    for query, key in ((-1, 2), (2, 0), (3, 3)):
        trace = lf.trace(model, ROWS)
        pairs = trace.attribute(lf.Score(LAYER, HEAD, query, key), by=by).verify(1e-10)
        for side, summed in (("query", pairs.by_query()), ("key", pairs.by_key())):
            one = trace.attribute(lf.Score(LAYER, HEAD, query, key, side), by=by).verify(1e-10)
            assert one.labels == summed.labels
            close(one.values, summed.values[..., 0])
            close(one.total, pairs.total[:, 0])


def logs(cache, query):
    """The logarithm of the head's pattern; from the scores where it is too small for a number."""
    pattern, scores = (cache[x, LAYER][0, HEAD, query] for x in ("pattern", "attn_scores"))
    return torch.where(pattern > 1e-300, pattern.log(), scores.log_softmax(-1))


def test_log_odds_of_both_sides_are_differences_of_the_log_pattern(model):
    for query, key, other in ((-1, 2, 0), (3, 0, 3), (-1, -1, -3)):
        for side in ("query", "key"):
            target = lf.LogOdds(LAYER, HEAD, key, other, query, side)
            for by in ("sublayer", "head", "source", "neuron"):
                found = lf.trace(model, ROWS).attribute(target, by=by).verify(1e-10)
                for row in range(len(ROWS)):
                    log_pattern = logs(one_prompt(model, row)[1], query)
                    close(found.total[row], log_pattern[key] - log_pattern[other])
                    close(found.values[:, row].sum(), found.total[row])


def test_log_odds_at_the_query_by_hand(model):
    n_of = [len(row) for row in ROWS].__getitem__
    sides = [
        side_read(model, "query", n_of, lambda row: n_of(row) - 1, lambda row, k=k: k)
        for k in (2, 0)
    ]
    checked(
        model, lf.LogOdds(LAYER, HEAD, key=2, other=0), f"blocks.{LAYER}.hook_resid_pre", -1,
        lambda row, cache, x: sides[0][0](row, cache, x) - sides[1][0](row, cache, x),
        lambda row, cache: {"b_Q": sides[0][1](row, cache) - sides[1][1](row, cache)},
        lambda row, cache: logs(cache, -1)[2] - logs(cache, -1)[0],
    )  # fmt: skip


def test_log_odds_at_the_keys_by_hand(model):
    """What is at one key minus what is at the other, each meeting the query."""
    found = lf.trace(model, ROWS).attribute(
        lf.LogOdds(LAYER, HEAD, key=2, other=0, side="key"), by="sublayer"
    )
    n_of = [len(row) for row in ROWS].__getitem__
    for row in range(len(ROWS)):
        _, cache = one_prompt(model, row)
        at = {}
        for k in (2, 0):
            read, bias = side_read(model, "key", n_of, lambda row: n_of(row) - 1, lambda r, k=k: k)
            parts = vectors(cache, f"blocks.{LAYER}.hook_resid_pre", k)
            at[k] = {label: read(row, cache, x) for label, x in parts.items()}
            at[k]["b_K"] = bias(row, cache)
        one = found.select(row)
        assert set(one.labels) == set(at[0])
        for label in one.labels:
            close(one[label], at[2][label] - at[0][label])


@pytest.mark.parametrize("of", ["pre", "post"])
def test_neuron(model, of):
    mlp, gated = model.blocks[1].mlp, model.cfg.gated_mlp
    place = "blocks.1.hook_resid_pre" if model.cfg.parallel_attn_mlp else "blocks.1.hook_resid_mid"
    W = mlp.W_gate if gated and of == "pre" else mlp.W_in

    def slope(cache):
        if of == "pre":
            return 1.0
        pre, post = (cache[x, 1][0, -1, 7] for x in ("pre", "post"))
        return mlp.act_fn(pre[None])[0] if gated else post / pre

    def constants(row, cache):
        if gated:
            return {} if of == "pre" else {"1_b_in": mlp.b_in[7]}
        return {"1_b_in": slope(cache) * mlp.b_in[7]}

    checked(
        model, lf.Neuron(1, 7, of=of), place, -1,
        lambda row, cache, x: slope(cache) * (x @ W[:, 7]), constants,
        lambda row, cache: cache[of, 1][0, -1, 7],
    )  # fmt: skip


def test_probe_at_one_position(model):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    place = "blocks.1.hook_resid_post"
    checked(
        model, lf.Probe(direction, place, pos=-3, bias=0.5), place, -3,
        lambda row, cache, x: x @ direction, lambda row, cache: {"probe.b": 0.5},
        lambda row, cache: cache[place][0, -3] @ direction + 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("pos", [slice(None), slice(1, 5, 2), slice(-2, None)])
def test_probe_along_a_direction_for_each_position(model, pos):
    tokens = torch.randint(300, (2, 7), generator=torch.Generator().manual_seed(4))
    n = len(range(7)[pos])
    directions = torch.randn(n, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    probe = lf.Probe(directions, "blocks.2.hook_resid_pre", pos, bias=-0.25)
    found = lf.trace(model, tokens).attribute(probe, by="sublayer").verify(1e-10)
    _, cache = model.run_with_cache(tokens)
    assert found.dims == ("prompt", "pos")
    close(found.total, (cache["resid_pre", 2][:, pos] * directions).sum(-1) - 0.25)
    close(found["0_mlp_out"], (cache["mlp_out", 0][:, pos] * directions).sum(-1))
    close(found["probe.b"], torch.full((2, n), -0.25, dtype=torch.float64))


@pytest.mark.parametrize("pos", [slice(None), slice(1, 5, 2), -2])
def test_probe_of_the_mean_over_positions(model, pos):
    tokens = torch.randint(300, (2, 7), generator=torch.Generator().manual_seed(4))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    at = "blocks.2.hook_resid_pre"
    target = lf.Probe(direction, at, pos, bias=-0.25, mean=True)
    trace, rows = lf.trace(model, tokens), pos if isinstance(pos, slice) else slice(-2, -1)
    _, cache = model.run_with_cache(tokens)
    expected = (cache["resid_pre", 2][:, rows].mean(1) @ direction - 0.25).detach()
    for by in ("layer", "sublayer", "head", "source", "neuron"):
        found = trace.attribute(target, by=by).verify(1e-10)
        assert found.dims == ("prompt",)
        close(found.total, expected)
        close(found["probe.b"], torch.full((2,), -0.25, dtype=torch.float64))
    found = trace.attribute(target, by="sublayer")
    close(found["0_mlp_out"], (cache["mlp_out", 0][:, rows].mean(1) @ direction).detach())
    close(lf.affine_map(trace, target).verify(1e-10).contributions.total, expected)
    close(lf.expand_paths(trace, target, top_k=None).verify(1e-10).total, expected)
    close(lf.flow_graph(trace, target, top_k=None).verify(1e-10).total, expected)
    effects = lf.ablate(trace, ["0_mlp_out"]).compare(target).verify(1e-10)
    close(effects.predicted[0], found["0_mlp_out"])


BEHIND = ["ln_final", "blocks.1.ln1.qk", "blocks.2.ln1.v", "blocks.1.ln2"]


@pytest.mark.parametrize("site", BEHIND)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama-grouped"])
def test_probe_behind_a_norm(kind, site, mean):
    model = frozen_model(kind)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target = lf.Probe(direction, site, slice(1, 4), bias=0.5, mean=mean)
    tokens = torch.tensor([ROWS[0]])
    found = lf.trace(model, tokens).attribute(target, by="sublayer").verify(1e-10)
    view = view_of(model)
    place, _ = read_at(view, site)
    _, cache = model.run_with_cache(tokens)
    normed = view.through_norm(site, cache[place.hook])[0, 1:4] @ direction
    close(found.total[0], (normed.mean() if mean else normed).detach() + 0.5)
    # A part's share is what the probe loses without it.
    part = cache["attn_out", 0][0, 1:4]
    without = view.through_norm(site, (cache[place.hook][0, 1:4] - part)[None])[0] @ direction
    lost = (normed - without).detach()
    close(found["0_attn_out"][0], lost.mean() if mean else lost)


@pytest.mark.parametrize("site", BEHIND)
def test_probe_behind_a_live_norm_is_refused_by_name_or_held_with_its_gap(site):
    model = live_model("gpt2")
    target = lf.Probe(torch.arange(32.0), site, slice(None), mean=True)
    with pytest.raises(InexactError, match=f"^{site} is not affine"):
        lf.attribute(model, ROWS[0], target)
    assert [str(one) for one in lf.norms_read(model, ROWS[0], target)] == [site]
    held = lf.attribute(lf.trace(model, ROWS[0], hold=True), target)
    with pytest.warns(HeldWarning, match=site):
        held.verify(1e-10)
    assert held.gap.relative > 1e-3


def test_the_gap_of_a_mean_over_much_text():
    """Of the whole mean, not of some of its positions."""
    model = live_model("gpt2", n_positions=256)
    tokens = torch.randint(300, (160,), generator=torch.Generator().manual_seed(0))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target = lf.Probe(direction, "ln_final", slice(None), mean=True)
    found = lf.attribute(lf.trace(model, tokens, hold=True), target, by="sublayer")
    _, cache = model.run_with_cache(tokens[None])
    stream, claims, lost = cache["resid_post", 2][0], [], []
    parts = vectors(cache, "blocks.2.hook_resid_post", slice(None))
    for label in sorted(parts, key=lambda label: -found[label].abs())[:4]:
        without = model.ln_final((stream - parts[label])[None])[0]
        claims.append(found[label])
        lost.append((model.ln_final(stream[None])[0] - without).mean(0) @ direction)
    claims, lost = torch.stack(claims), torch.stack(lost).detach()
    assert found.gap.absolute == pytest.approx((claims - lost).abs().max().item(), rel=1e-9)
    assert found.gap.relative == pytest.approx(
        found.gap.absolute / lost.abs().max().item(), rel=1e-9
    )


# A target that is defined here


@dataclass(frozen=True)
class MeanLogit:
    """The mean logit over several tokens, at each prompt's end."""

    answers: tuple

    def needs(self, trace):
        return trace.view.last, [trace.view.last.hook]

    def read(self, trace):
        trace.require_text()
        each = [lf.Logit(answer).read(trace) for answer in self.answers]
        n = len(each)
        constants = tuple(
            (component, sum(dict(one.constants)[component] for one in each) / n)
            for component, _ in each[0].constants
        )
        return replace(
            each[0],
            direction=sum(one.direction for one in each) / n,
            constants=constants,
            total=sum(one.total for one in each) / n,
            again=lambda stream, some: sum(one.again(stream, some) for one in each) / n,
            of=("mean logit",) * trace.batch,
            identity="parts = the mean logit",
        )


THREE = MeanLogit((3, 5, 7))


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_a_target_of_your_own_in_every_call(model, form):
    subject = model if form == "folded" else lf.frozen_form(model)
    trace = lf.trace(subject, ROWS)
    expected = torch.stack([one_prompt(model, i)[0][-1, [3, 5, 7]].mean() for i in range(2)])
    each = [trace.attribute(lf.Logit(answer)) for answer in THREE.answers]
    found = trace.attribute(THREE).verify(1e-10)
    close(found.values, sum(one.values for one in each) / 3)
    close(found.total, expected)
    affine = lf.affine_map(trace, THREE).verify(1e-10)
    three = [lf.affine_map(trace, answer) for answer in THREE.answers]
    close(affine.by_token, sum(one.by_token for one in three) / 3)
    close(affine.jacobian, sum(one.jacobian for one in three) / 3)
    paths = lf.expand_paths(trace, THREE, top_k=None, expansions=30).verify(1e-10)
    close(paths.total, expected)
    flow = lf.flow_graph(trace, THREE, top_k=None).verify(1e-10)
    close(flow.total, expected)
    three = [lf.flow_graph(trace, answer, top_k=None) for answer in THREE.answers]
    node = flow.names.index("L1H2@3")
    each = [one.flow[one.names.index("L1H2@3")] for one in three]
    close(flow.flow[node], sum(each) / 3)
    effects = lf.ablate(trace, ["L2H1", "0_mlp_out"]).compare(THREE).verify(1e-10)
    close(effects.predicted[0], found["L2H1"])
    assert trace.runs == 1
    with pytest.raises(DataError, match="has its foil in itself"):
        lf.flow_graph(trace, THREE, 3)


def test_other_targets_through_paths_flow_and_the_affine_map(model):
    trace = lf.trace(model, ROWS)
    for target in (
        lf.Logit(7, pos=-2),
        lf.Score(LAYER, HEAD, key=1, side="query"),
        lf.Score(LAYER, HEAD, query=2, key=1, side="key"),
        lf.LogOdds(LAYER, HEAD, key=2, other=0, side="query"),
        lf.LogOdds(LAYER, HEAD, key=2, other=0, side="key"),
        lf.Neuron(1, 7),
        lf.Neuron(1, 7, of="post"),
        lf.Probe(torch.arange(32.0), "blocks.1.hook_resid_post", bias=0.5),
    ):
        whole = trace.attribute(target, by="head").verify(1e-10)
        paths = lf.expand_paths(trace, target, top_k=None, expansions=0).verify(1e-10)
        for label in [label for label in whole.labels if "H" in label]:
            close(sum(value for one, value in paths if one.label == label), whole[label])
        affine = lf.affine_map(trace, target).verify(1e-10)
        graph = lf.flow_graph(trace, target, top_k=None).verify(1e-10)
        for result in (paths, affine.contributions, graph):
            close(result.total, whole.total)
            assert result.unit == whole.unit
        for row in range(len(ROWS)):
            tokens = sum(n.flow for n in graph.select(row).nodes if "embed" in n.kind)
            assert tokens == pytest.approx(affine.by_token[row].sum().item(), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("side", ["query", "key"])
def test_paths_of_log_odds_are_listed_once(side):
    model = folded_model("gpt2")
    trace, target = lf.trace(model, ROWS[0]), lf.LogOdds(LAYER, HEAD, key=2, other=0, side=side)
    paths = lf.expand_paths(trace, target, top_k=None, expansions=0)
    close(paths["L1H2"], trace.attribute(target)["L1H2"])
    assert len(set(paths.labels)) == len(paths)


def test_targets_that_there_are_not_are_refused():
    trace = lf.trace(folded_model("gpt2"), ROWS)
    for target, message in (
        (lf.Score(3, 0, side="key"), "no L3H0"),
        (lf.Score(-1, 0, side="key"), "no L-1H0"),
        (lf.Score(1, 0, key=5, side="key"), "no position 5"),
        (lf.Score(1, 0, query=1, key=3, side="key"), "does not see key"),
        (lf.LogOdds(1, 0, 1, 3, query=2), "does not see key"),
        (lf.Neuron(1, 128), "neurons 0 to 127"),
        (lf.Neuron(1, -1), "neurons 0 to 127"),
        (lf.Probe(torch.ones(31)), "has 32 entries"),
        (lf.Probe(torch.ones(3, 32)), "do not fit"),
        (lf.Probe(torch.ones(32), "blocks.0.mlp.hook_pre"), "no place"),
        (lf.Probe(torch.ones(32), pos=slice(0, 2)), "differ in length"),
        (lf.Logit(300), "outside the vocabulary"),
        (lf.Logit(3, pos=4), "no position 4"),
        (lf.LogitDifference(3, 3), "answer and foil"),
        (lf.NextTokens(), "differ in length"),
    ):
        with pytest.raises(DataError, match=message):
            trace.attribute(target)
