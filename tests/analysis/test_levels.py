"""A level that is defined here: rows of a dictionary, what they miss, and heads and MLPs behind."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from support.loaded import folded_model, frozen_model, live_model
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.errors import DataError, HeldWarning

N, QUERY = 24, 5
TOKENS = torch.tensor([11, 12, 13, 12, 14, 15])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@dataclass
class Dictionary:
    """Sparse random coefficients of each token, times the rows of a dictionary."""

    W: torch.Tensor
    layer: int = 1
    name: str = "feature"

    def __post_init__(self):
        generator = torch.Generator().manual_seed(7)
        table = torch.rand(300, len(self.W), generator=generator, dtype=torch.float64)
        self.table = table * (table > 0.6)

    def acts(self, tokens):
        return self.table[tokens]

    def _behind(self, place):
        return (place.layer, place.mid) >= (self.layer, False)

    def needs(self, view, place):
        names = lf.level("head").needs(view, place)
        return [*names, lf.Place(self.layer).hook] if self._behind(place) else names

    def parts(self, trace, place, at=None, biases=False):
        behind = self._behind(place)
        if behind:
            acts, here = self.acts(trace.tokens), lf.Place(self.layer)
            missed = trace.stream(here) - acts @ self.W
            if at is not None:
                acts, missed = at.of(acts), at.of(missed)
            rows = tuple(lf.Component("feature", self.layer, i) for i in range(len(self.W)))
            yield lf.parts.Rows(rows, here, acts, self.W)
            yield lf.parts.Dense((lf.Component("error", self.layer),), here, missed)
        for part in lf.level("head").parts(trace, place, at, biases):
            if not behind or (part.written.layer, part.written.mid) > (self.layer, False):
                yield part


def dictionary(layer=1):
    W = torch.randn(N, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Dictionary(W / 32**0.5, layer)


@pytest.fixture(scope="module")
def gpt2():
    return folded_model("gpt2")


@pytest.fixture(scope="module")
def kept(gpt2):
    return gpt2.run_with_cache(TOKENS[None])[1]


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama-grouped", "qwen3", "gemma2-no-caps"])
@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_every_sum_is_exact(kind, form):
    model = folded_model(kind)
    model = model if form == "folded" else lf.frozen_form(model)
    trace, by = lf.trace(model, [TOKENS, TOKENS[:4]]), dictionary()
    for result in (
        lf.attribute_logits(trace, 3, 5, by=by),
        lf.attribute_logits(trace, [[3, 4], [5, 6]], by=by, biases=True),
        lf.attribute_scores(trace, 2, 1, by=by),
        trace.attribute(lf.LogOdds(2, 1, key=1, other=0, side="key"), by=by),
        lf.attribute_neuron(trace, 2, 7, by=by),
        lf.attribute_neuron(trace, 1, 7, of="post", by=by),
        lf.decompose_residual(trace, by=by),
        lf.decompose_residual(trace, "blocks.0.hook_resid_post", by=by, pos=-2),
        lf.expand_paths(trace, 3, 5, by=by, top_k=None, expansions=10_000),
        lf.flow_graph(trace, 3, 5, by=by, top_k=None),
        lf.attribute_next_tokens(lf.trace(model, TOKENS), by=by),
        lf.counterfactual_pattern(trace.select(0), 2, 1, ["L1.feature17", "1_error"], by=by),
        lf.flip_distances(trace.select(0), 2, "L1.feature17", by=by),
    ):
        result.verify(1e-10)
        assert not result.held
    assert trace.runs == 1


def test_the_stream_of_a_live_model_is_the_sum_of_its_rows(gpt2_folder):
    live = lf.load(gpt2_folder, dtype=torch.float64)
    lf.decompose_residual(live, TOKENS, by=dictionary()).verify(1e-10)
    held = lf.attribute_logits(lf.trace(live, TOKENS, hold=True), 3, by=dictionary())
    assert held.gap.relative > 1e-3
    with pytest.warns(HeldWarning):
        held.verify(1e-10)


def test_labels_are_those_of_rows_and_are_read_back(gpt2):
    by = dictionary()
    found = lf.attribute_logits(gpt2, TOKENS, 3, by=by)
    assert found.labels[:N] == [f"L1.feature{i}" for i in range(N)]
    assert found.labels[N] == "1_error"
    assert not {"embed", "pos_embed", "L0H0", "0_mlp_out", "0_b_O"} & set(found.labels)
    assert {"L1H0", "1_mlp_out", "1_b_O", "L2H3", "b_U"} <= set(found.labels)
    assert lf.Component.parse("L1.feature17") == found.components[17]
    assert found.of_kind("feature").shape == (N,)
    assert found.level == "feature"
    with pytest.raises(DataError, match=r"did you mean L1\.feature17"):
        found["L1.feature177"]
    before = lf.decompose_residual(gpt2, TOKENS, "blocks.0.hook_resid_mid", by=by)
    assert before.labels == lf.decompose_residual(gpt2, TOKENS, "blocks.0.hook_resid_mid").labels


def test_logits_by_rows_equal_brute_force(gpt2):
    by = dictionary()
    found = lf.attribute_logits(gpt2, TOKENS, 3, 5, by=by)
    direction = gpt2.W_U[:, 3] - gpt2.W_U[:, 5]
    expected = by.acts(TOKENS)[-1] * (by.W @ direction)
    close(found.of_kind("feature"), expected)
    assert 3 < (expected == 0).sum() < N - 3  # sparse, and not empty
    heads = lf.attribute_logits(gpt2, TOKENS, 3, 5)
    for label in ("L1H2", "2_mlp_out", "2_b_O"):
        close(found[label], heads[label])
    early = ["embed", "pos_embed", "L0H0", "L0H1", "L0H2", "L0H3", "0_b_O", "0_mlp_out"]
    left = sum(heads[label] for label in early)
    close(found.of_kind("feature").sum() + found["1_error"], left)


def test_scores_by_rows_equal_brute_force(gpt2, kept):
    by = dictionary()
    scores = lf.attribute_scores(gpt2, TOKENS, 2, 1, query=QUERY, by=by).verify(1e-10)
    W_Q, W_K, acts = gpt2.W_Q[2, 1], gpt2.W_K[2, 1], by.acts(TOKENS)
    q = acts[QUERY][:, None] * by.W @ W_Q
    k = acts[:, :, None] * by.W @ W_K
    close(scores.values[:N, :N], torch.einsum("id,pjd->ijp", q, k) / 8**0.5)
    close(scores["L1.feature17", "b_K"][0], q[17] @ gpt2.b_K[2, 1] / 8**0.5)
    missed = (kept["resid_post", 0][0] - acts @ by.W)[3] @ W_K
    close(scores["L1.feature3", "1_error"][3], q[3] @ missed / 8**0.5)


@pytest.mark.parametrize("kind", ["llama-grouped", "gemma2-no-caps", "neox"])
def test_a_row_at_the_query_is_what_the_score_loses_without_it(kind):
    model, by = folded_model(kind), dictionary()
    scores = lf.attribute_scores(model, TOKENS, 2, 1, query=QUERY, by=by).by_query()
    _, cache = model.run_with_cache(TOKENS[None])
    stream = cache["resid_pre", 2].clone()
    row = int(by.acts(TOKENS)[QUERY].argmax())
    stream[0, QUERY] -= by.acts(TOKENS)[QUERY, row] * by.W[row]
    name = "blocks.2.attn.hook_attn_scores"
    without = model.run_with_cache(stream, start_at_layer=2, names_filter=name)[1][name]
    lost = (cache[name] - without)[0, 1, QUERY]
    close(scores[f"L1.feature{row}"][:QUERY], lost[:QUERY])  # the key at the query changes, too
    assert lost[:QUERY].abs().max() > 1e-3


def test_neurons_by_rows_equal_brute_force(gpt2):
    by = dictionary()
    found = lf.attribute_neuron(gpt2, TOKENS, 2, 7, pos=3, by=by)
    close(found.of_kind("feature"), by.acts(TOKENS)[3] * (by.W @ gpt2.W_in[2][:, 7]))


def test_the_stream_by_rows_equals_brute_force(gpt2, kept):
    by = dictionary()
    found = lf.decompose_residual(gpt2, TOKENS, "blocks.2.hook_resid_mid", pos=slice(None), by=by)
    acts = by.acts(TOKENS)
    close(found.of_kind("feature"), acts.T[..., None] * by.W[:, None])
    close(found["1_error"], kept["resid_pre", 1][0] - acts @ by.W)
    close(found.total, kept["resid_mid", 2][0])
    direction = torch.arange(32, dtype=torch.float64)
    onto = lf.decompose_residual(gpt2, TOKENS, by=by, onto=direction)
    close(onto["L1.feature17"], acts[-1, 17] * by.W[17] @ direction)


def test_paths_from_rows_equal_brute_force(gpt2, kept):
    by = dictionary()
    paths = lf.expand_paths(gpt2, TOKENS, 3, by=by, top_k=None, expansions=10_000).verify(1e-10)
    acts, OV = by.acts(TOKENS), gpt2.W_V @ gpt2.W_O
    pattern = [kept["pattern", layer][0] for layer in range(3)]
    unembed = gpt2.W_U[:, 3]
    row = int(acts[3].argmax())
    wrote = acts[3, row] * by.W[row]
    close(paths[f"L1.feature{row}@5"], acts[5, row] * by.W[row] @ unembed)
    close(paths[f"L1.feature{row}@3 > L2H1"], pattern[2][1, -1, 3] * wrote @ OV[2, 1] @ unembed)
    looks = (pattern[2][1] @ pattern[1][0])[-1, 3]
    expected = looks * wrote @ OV[1, 0] @ OV[2, 1] @ unembed
    close(paths[f"L1.feature{row}@3 > L1H0 > L2H1"], expected)
    assert abs(expected) > 1e-6
    assert not any(label.startswith(("embed", "L0H")) for label in paths.labels)


@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped", "neox"])
def test_flow_from_rows_is_conserved(kind):
    model, by = folded_model(kind), dictionary()
    graph = lf.flow_graph(model, TOKENS, 3, 5, by=by, top_k=None).verify(1e-10)
    into, out = Counter(), Counter()
    for edge in graph.edges:
        into[edge.target] += edge.flow
        out[edge.source] += edge.flow
    sources = {"feature", "error"}
    assert {node.kind for node in graph.nodes} == sources | {"head", "mlp_out", "logit"}
    for node in graph.nodes:
        assert abs(node.from_rest) < 1e-10
        assert abs(node.to_rest) < 1e-10
        if node.kind not in sources:
            assert into[node.name] + node.from_biases == pytest.approx(node.flow, abs=1e-10)
        if node.kind != "logit":
            assert out[node.name] == pytest.approx(node.flow, abs=1e-10)
    few = lf.flow_graph(model, TOKENS, 3, 5, by=by, top_k=7).verify(1e-10)
    assert len(few.nodes) == 7 + 1
    for node in few.nodes:
        assert node.flow == pytest.approx(graph.node(node.name).flow, abs=1e-10)


class HalvedMLPs:
    """Heads; and what each MLP wrote in two parts, neither of which the MLP computes alone."""

    name = "half"

    def needs(self, view, place):
        return lf.level("head").needs(view, place)

    def parts(self, trace, place, at=None, biases=False):
        for part in lf.level("head").parts(trace, place, at, biases):
            if part.components[0].kind != "mlp_out":
                yield part
                continue
            layer, out = part.components[0].layer, part.vectors([0])[:, :, 0]
            first = torch.arange(out.shape[-1]) < 10
            for index, mask in enumerate((first, ~first)):
                yield lf.parts.Dense(
                    (lf.Component("half", layer, index),), part.written, out * mask
                )


@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped", "neox"])
def test_flow_starts_where_a_level_takes_mlps_apart(kind):
    graph = lf.flow_graph(folded_model(kind), TOKENS, 3, 5, by=HalvedMLPs(), top_k=None)
    graph.verify(1e-10)
    out = Counter()
    for edge in graph.edges:
        out[edge.source] += edge.flow
        assert not edge.target.startswith("half")
    halves = [node for node in graph.nodes if node.kind == "half"]
    assert halves
    for node in halves:
        assert out[node.name] == pytest.approx(node.flow, abs=1e-10)


def test_flow_of_a_row_equals_autograd(gpt2, kept):
    """Patterns and gates given, a row's flow is its vector times the gradient there."""
    by, model = dictionary(), folded_model("gpt2")
    graph = lf.flow_graph(model, TOKENS, 3, by=by, top_k=None)
    stream = kept["resid_pre", 1].clone().requires_grad_(True)
    hooks = [
        (f"blocks.{i}.attn.hook_pattern", lambda x, hook: kept[hook.name].detach()) for i in (1, 2)
    ]
    for layer in (1, 2):
        gate = (kept["post", layer] / kept["pre", layer]).detach()
        model.blocks[layer].mlp.act_fn = lambda x, gate=gate: x * gate
    with model.hooks(hooks):
        model(stream, start_at_layer=1)[0, -1, 3].backward()
    flows = by.acts(TOKENS) * (stream.grad[0] @ by.W.T)
    for pos in range(len(TOKENS)):
        for row in range(N):
            assert graph.node(f"L1.feature{row}@{pos}").flow == pytest.approx(
                flows[pos, row].item(), rel=1e-9, abs=1e-12
            )


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_a_row_of_the_last_stream_taken_away_moves_the_logit_by_its_share(form):
    """Nothing reads it but the logits: predicted, direct and total effect are one number."""
    model, by = folded_model("gpt2"), dictionary(layer=3)
    model = model if form == "folded" else lf.frozen_form(model)
    trace, target = lf.trace(model, [TOKENS, TOKENS[1:5]]), lf.LogitDifference(3, 5)
    shares = trace.attribute(target, by=by).verify(1e-10)
    labels = [f"L3.feature{i}" for i in range(N)] + ["3_error"]
    effects = lf.ablate(trace, labels, by=by).compare(target).verify(1e-10)
    for row, label in enumerate(labels):
        close(effects.predicted[row], shares[label])
        close(effects.direct[row], shares[label])
        close(effects.total_effect[row], shares[label])
    close(effects.total_effect[-1], shares.values[: N + 1].sum(0))
    assert effects.components[-1] == "all of them"


@pytest.mark.parametrize("form", ["live", "folded"])
def test_taking_a_row_away_is_a_run_without_it(form):
    model, by = live_model("gpt2"), dictionary()
    model = model if form == "live" else lf.fold(freeze_all(model))
    row = int(by.acts(TOKENS)[-1].argmax())
    change, label = by.acts(TOKENS)[:, row, None] * by.W[row], f"L1.feature{row}"
    intervention = lf.ablate(lf.trace(model, TOKENS, hold=form == "live"), label, by=by)
    effects = intervention.compare(lf.Logit(3))
    without = model.run_with_hooks(
        TOKENS[None], fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x - change)]
    )
    close(effects.total_effect[0, 0], model(TOKENS[None])[0, -1, 3] - without[0, -1, 3])
    found = model.run_with_hooks(TOKENS[None], fwd_hooks=intervention.hooks())
    close(found, without)
    assert effects.total_effect.abs().max() > 1e-4


@pytest.mark.parametrize("with_", ["mean", "trace"])
def test_rows_by_their_mean_or_another_trace(gpt2, with_):
    by, other = dictionary(), TOKENS.flip(0)
    trace = lf.trace(gpt2, TOKENS)
    acts = by.acts(TOKENS)
    instead = acts.mean(0).expand_as(acts) if with_ == "mean" else by.acts(other)
    row = int((acts - instead)[-1].abs().argmax())
    change = (acts - instead)[:, row, None] * by.W[row]
    replacement = "mean" if with_ == "mean" else lf.trace(gpt2, other)
    effects = lf.ablate(trace, f"L1.feature{row}", replacement, by=by).compare(lf.Logit(3))
    without = gpt2.run_with_hooks(
        TOKENS[None], fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x - change)]
    )
    close(effects.total_effect[0, 0], gpt2(TOKENS[None])[0, -1, 3] - without[0, -1, 3])
    close(effects.predicted[0, 0], change[-1] @ gpt2.W_U[:, 3])


def test_rows_of_several_prompts_are_what_each_has_alone(gpt2):
    by, prompts = dictionary(), [TOKENS, TOKENS[2:5], TOKENS[:5]]
    batch = lf.attribute_logits(gpt2, prompts, 3, by=by)
    scores = lf.attribute_scores(gpt2, prompts, 2, 1, by=by)
    for i, prompt in enumerate(prompts):
        close(batch.select(i).values, lf.attribute_logits(gpt2, prompt, 3, by=by).values)
        alone = lf.attribute_scores(gpt2, prompt, 2, 1, by=by)
        close(scores.select(i).values[..., : len(prompt)], alone.values)


def test_a_level_is_found_by_name_or_is_itself(gpt2):
    for wrong in ("block", "heads", ""):
        with pytest.raises(DataError, match="is no level"):
            lf.level(wrong)
    by = dictionary()
    assert lf.level(by) is by
    with pytest.raises(DataError, match="is no level"):
        lf.attribute_logits(gpt2, TOKENS, 3, by="block")


# Sources and value biases: one answer in every form


def forms(kind):
    """One model in every form that it can have."""
    sites = frozen_model(kind)
    folded = lf.fold(sites)
    return {"folded": folded, "sites": sites, "frozen": lf.frozen_form(folded)}


ASKS = {
    "logits": lambda t, **how: lf.attribute_logits(t, 3, 5, **how),
    "neuron": lambda t, **how: lf.attribute_neuron(t, 2, 7, **how),
    "log-odds": lambda t, **how: lf.attribute(t, lf.LogOdds(2, 1, key=1, other=0), **how),
}


@pytest.mark.parametrize("kind", ["gpt2", "neox", "qwen2"])
@pytest.mark.parametrize("name", ASKS)
@pytest.mark.parametrize("how", [{"by": "source"}, {"biases": True}], ids=["source", "biases"])
def test_sources_and_value_biases_are_one_answer_in_every_form(kind, name, how):
    made = forms(kind)
    first = ASKS[name](lf.trace(made["folded"], TOKENS), **how).verify(1e-10)
    for model in made.values():
        found = ASKS[name](lf.trace(model, TOKENS), **how).verify(1e-10)
        heads = [c.label for c in found.components if c.kind in ("head", "b_V")]
        assert heads == [c.label for c in first.components if c.kind in ("head", "b_V")]
        for label in heads:
            close(found[label], first[label])
    assert first.of_kind("b_V").abs().min() > 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_source_is_what_its_stream_adds_and_no_bias(kind):
    """By hand in the form with norm sites, whose norms have gains, biases and scales."""
    model = forms(kind)["sites"]
    found = lf.attribute_logits(model, TOKENS, 3, by="source").verify(1e-10)
    _, cache = model.run_with_cache(TOKENS[None])
    layer, head = 1, 2
    v = cache["v", layer][0][:, head * cache["v", layer].shape[2] // model.cfg.n_heads]
    nothing = torch.zeros(1, 1, model.cfg.d_model, dtype=torch.float64)
    name = f"blocks.{layer}.attn.hook_v"
    v_bias = model.run_with_cache(nothing, start_at_layer=layer, stop_at_layer=layer + 1,
                                  names_filter=name)[1][name]  # fmt: skip
    v_bias = v_bias[0, 0, head * v_bias.shape[2] // model.cfg.n_heads]
    assert v_bias.abs().max() > 1e-3
    pattern, W_O = cache["pattern", layer][0, head, -1], model.W_O[layer, head]

    def share(z):
        stream = torch.stack([cache["resid_post", 2][0, -1], cache["resid_post", 2][0, -1]])
        stream[1] -= z @ W_O
        return model.unembed(model.ln_final(stream[None]))[0, :, 3].diff().neg()[0]

    for pos in range(len(TOKENS)):
        close(found[f"L{layer}H{head}@{pos}"], share(pattern[pos] * (v[pos] - v_bias)))
    close(found[f"L{layer}H{head}.b_V"], share(v_bias))


@pytest.mark.parametrize("kind", ["gpt2", "neox", "qwen2"])
@pytest.mark.parametrize("form", ["folded", "sites", "frozen"])
def test_paths_and_attribution_agree_on_sources_and_value_biases(kind, form):
    model = forms(kind)[form]
    trace = lf.trace(model, TOKENS)
    by_head = lf.attribute_logits(trace, 3, 5, biases=True).verify(1e-10)
    by_source = lf.attribute_logits(trace, 3, 5, by="source").verify(1e-10)
    closed = lf.expand_paths(trace, 3, 5, by="source", top_k=None, expansions=0).verify(1e-10)
    for component, value in by_source:
        if component.kind in ("head", "b_V", "b_O", "b_U"):
            close(closed[component], value)
    # Opened, each head is its bias and what came from the tokens through it.
    opened = lf.expand_paths(trace, 3, 5, top_k=None, expansions=10_000).verify(1e-10)
    for layer in range(3):
        for head in range(model.cfg.n_heads):
            label = f"L{layer}H{head}"
            close(opened[f"{label}.b_V"], by_head[f"{label}.b_V"])
            through = sum(v for c, v in opened if c.through and c.through[-1].label == label)
            close(through, by_head[label])
            sources = sum(by_source[f"{label}@{pos}"] for pos in range(len(TOKENS)))
            close(sources, by_head[label])
