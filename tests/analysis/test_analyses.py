"""Every analysis adds up on every form and architecture; its certificate fails when it should."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from support import mutations
from support.loaded import frozen_model, live_model
from support.models import freeze_all, make_gpt2

import lnfree_interp as lf
from lnfree_interp.errors import DataError, HeldWarning, InexactError

KINDS = ["gpt2", "neox", "llama-grouped", "qwen3", "gemma2-no-caps", "neo", "opt", "mistral"]


def free_model(kind, dtype=torch.float64, form="folded", **settings):
    live = live_model(kind, dtype, **settings)
    folded = lf.fold(freeze_all(live))
    return folded if form == "folded" else lf.frozen_form(folded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_every_certificate_holds(kind, form):
    certificates = lf.certify(free_model(kind, form=form))
    table = lf.certificate_table(certificates)
    assert len(table) >= 24
    assert table["holds"].all()
    assert table["relative"].max() <= 1e-10
    assert set(table["dtype"]) == {"float64"}


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama-grouped"])
def test_in_float32(kind):
    certificates = lf.certify(free_model(kind, torch.float32))
    assert max(certificate.error.relative for certificate in certificates) <= 1e-5


@pytest.mark.parametrize(
    "size",
    [
        {"n_layer": 1, "n_head": 1, "n_embd": 8},
        {"n_layer": 2, "n_head": 8, "n_embd": 64},
        {"n_layer": 6, "n_head": 2, "n_embd": 16, "n_inner": 20},
    ],
)
@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_on_other_shapes(size, activation):
    live = lf.load(
        make_gpt2(**size, activation_function=activation), dtype=torch.float64, check=False
    )
    certificates = lf.certify(lf.fold(freeze_all(live)))
    assert max(certificate.error.relative for certificate in certificates) <= 1e-10
    affine = [c for c in certificates if c.identity.startswith("MLP half way")]
    assert len(affine) == (activation == "relu")


def test_with_frozen_norm_sites_that_are_not_folded():
    sites = frozen_model("gpt2")
    assert all(certificate.holds for certificate in lf.certify(sites))
    assert "ln1.b" in " ".join(lf.attribute_scores(sites, torch.arange(6), 1, 0).by_key().labels)


def test_attention_only():
    cfg = {"n_layers": 3, "d_model": 32, "n_heads": 4, "d_head": 8, "n_ctx": 24, "d_vocab": 50}
    from transformer_lens import HookedTransformer

    torch.manual_seed(0)
    model = HookedTransformer(cfg | {"attn_only": True, "normalization_type": None, "seed": 0})
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter, dtype=torch.float64)
    model.cfg.dtype = torch.float64
    assert all(certificate.holds for certificate in lf.certify(model))
    # With every head opened, a path starts at an embedding or a bias, never inside.
    paths = lf.expand_paths(model, torch.arange(6), 3, top_k=None, expansions=10_000).verify()
    assert {component.kind for component in paths.components} == {
        "embed", "pos_embed", "b_O", "b_V", "b_U",
    }  # fmt: skip
    embeds = [c for c in paths.components if c.kind == "embed"]
    assert len(embeds) == 6 * 5**3  # by position, too
    with pytest.raises(DataError, match="no MLP"):
        lf.attribute_neuron(model, torch.arange(6), 0, 0)


def test_with_live_norms_sums_hold_and_what_changes_the_stream_does_not(live):
    with pytest.raises(InexactError, match=r"hold=True"):
        lf.certify(live)
    certificates = lf.certify(live, hold=True)
    assert all(c.held for c in certificates if "hook_resid" not in c.identity)
    table = lf.certificate_table(certificates)
    assert set(table.loc[table["held"] == "", "identity"]) == {
        c.identity for c in certificates if "hook_resid" in c.identity
    }
    failing = {c.identity for c in certificates if not c.holds}
    assert failing == {
        "effect(A) + effect(B) = effect(A and B) = attribution",
        "predicted effect = effect on the stream that is read",
        "a token's share = what the logit loses without it, patterns and gates given",
    }
    held = lf.attribute_logits(lf.trace(live, torch.arange(6), hold=True), 3)
    assert held.gap.relative > 0.01
    with pytest.warns(HeldWarning, match=r"ln_final held, which misses .* not exact"):
        held.verify()


def test_the_measured_gap_is_what_removing_a_part_shows(live):
    tokens = torch.arange(8)
    held = lf.attribute_logits(lf.trace(live, tokens, hold=True), 3, 5, by="sublayer")
    stream = lf.decompose_residual(live, tokens, by="sublayer")
    worst, largest = 0.0, 0.0
    in_stream = [c for c in held.components if c.kind not in ("ln_final.b", "b_U")]
    for component in sorted(in_stream, key=lambda c: -held[c].abs())[:4]:
        without = (stream.total - stream[component])[None, None]
        logits = live(without, start_at_layer=live.cfg.n_layers)[0, 0]
        effect = held.total - (logits[3] - logits[5])
        worst = max(worst, (effect - held[component]).abs().item())
        largest = max(largest, effect.abs().item())
    assert held.gap.absolute == pytest.approx(worst, rel=1e-3)
    assert held.gap.relative == pytest.approx(worst / largest, rel=1e-3)


def held_results(live, tokens):
    """Every analysis of a model with live norms."""
    trace, last = lf.trace(live, tokens, hold=True), live.cfg.n_layers - 1
    return {
        "logits": lf.attribute_logits(trace, 3, 5),
        "sum": lf.attribute_logits(trace, 3, 5) - lf.attribute_logits(trace, 7, 5),
        "scores": lf.attribute_scores(trace, last, 1, query=5),
        "by query": lf.attribute_scores(trace, last, 1, query=5).by_query(),
        "by key": lf.attribute_scores(trace, last, 1, query=5).by_key(),
        "one side": trace.attribute(lf.Score(last, 1, query=5, key=2, side="key")),
        "log-odds": trace.attribute(lf.LogOdds(last, 1, query=5, key=2, other=1, side="key")),
        "odds": lf.attribute_scores(trace, last, 1, query=5).log_odds(2, 1),
        "neuron": lf.attribute_neuron(trace, last, 2),
        "affine": lf.affine_map(trace, 3, 5),
        "paths": lf.expand_paths(trace, 3, 5),
        "flow": lf.flow_graph(trace, 3, 5),
        "lens": lf.logit_lens(trace),
        "pattern": lf.counterfactual_pattern(trace, last, 1, "embed"),
        "ablation": lf.ablate(trace, "L0H1").compare(lf.LogitDifference(3, 5)),
    }


def test_a_held_norm_never_looks_exact(live):
    """In the line, the warning of `verify`, the certificate, the table and the picture."""
    for name, result in held_results(live, torch.arange(8)).items():
        assert result.held, name
        assert result.gap.relative > 1e-3, name
        assert "held, which misses" in repr(result), name
        if name == "ablation":  # nothing is held in what it measures: the prediction misses it
            with pytest.raises(InexactError, match="which misses"):
                result.verify()
        else:
            with pytest.warns(HeldWarning, match="which misses"):
                result.verify()
        table = lf.certificate_table([result.certificate])
        assert table["held"][0], name
        assert table["gap"][0] == result.gap.relative
        frames = [result.to_frame()]
        if name == "scores":
            frames.append(result.top(key=2, k=3))
        elif name not in ("by query", "by key"):  # these have a dimension of keys
            frames.append(result.top(3))
        for frame in frames:
            assert frame["held"].str.contains("which misses").all(), name
        draw = {"scores": lf.plots.scores, "flow": lf.plots.flow, "lens": lf.plots.lens,
                "pattern": lf.plots.pattern, "paths": lf.plots.paths}  # fmt: skip
        if name in draw or name in ("logits", "affine", "neuron"):
            figure = draw.get(name, lf.plots.attribution)(result)
            subtitle = figure.layout.title.subtitle.text.replace("<br>", " ")  # lines that fit
            assert "NOT exact" in subtitle, name
            assert "which misses" in subtitle, name
            assert "no norm" not in subtitle, name


def test_every_analysis_that_holds_a_norm_measures_what_that_misses(live):
    tokens = torch.arange(8)
    last = live.cfg.n_layers - 1
    found = held_results(live, tokens)
    assert found["flow"].gap == found["affine"].gap
    scores = found["scores"]

    # One of them by hand: the query without the component that claims most.
    claims = scores.by_query()
    stream = lf.decompose_residual(live, tokens, f"blocks.{last}.hook_resid_pre", pos=5)
    component = max(stream.components, key=lambda c: claims[c].abs().mean())
    block = live.blocks[last]
    q = block.ln1((stream.total - stream[component])[None, None])[0, 0] @ block.attn.W_Q[1]
    q = q + block.attn.b_Q[1]
    k = live.run_with_cache(tokens)[1]["k", last][0, list(scores.keys), 1]
    effect = scores.total - k @ q / block.attn.attn_scale
    assert (claims[component] - effect).abs().max() <= scores.gap.absolute * (1 + 1e-4)
    assert (claims[component] - effect).abs().max() > 1e-3 * scores.gap.absolute

    free = free_model("gpt2", torch.float32)
    assert lf.attribute_scores(lf.trace(free, tokens, hold=True), 1, 1).gap is None


SEES = {  # mutation: pieces of the names of certificates that must fail on it
    "drop b_V": [
        "heads: ", "sources", "neurons", "pairs", "patched", "tokens +", "paths +", "node",
        "predicted",
    ],
    "drop b_O": ["heads: ", "sources", "neurons", "pairs", "tokens +", "paths +", "node"],
    "drop b_out": ["neurons", "tokens +", "node"],
    "drop b_in": ["tokens +", "node"],
    "wrong positions": ["sum over", "node", "share"],
    "wrong scale": [
        "sum over", "patched", "node", "lens", "predicted", "effect(A)", "OV table", "share",
    ],
    "transposed W_O": [
        "heads: ", "sources", "neurons", "pairs", "patched", "tokens +", "paths +", "node",
        "predicted", "effect(A)", "OV table", "share",
    ],
    "swapped heads": [
        "heads: ", "sources", "neurons", "pairs", "patched", "tokens +", "paths +", "node",
        "predicted", "effect(A)", "OV table", "share",
    ],
    "wrong norm": [
        "logits", "score", "log-odds", "patched", "pre of", "post of", "flip", "node", "lens",
        "predicted", "effect", "share", "OV table",
    ],
    "drop b_Q and b_K": ["score", "at the query = log-odds"],
    "no score scale": ["score", "log-odds", "patched"],
    "swapped queries and keys": ["score", "log-odds", "patched"],
    "dropped norm bias": [
        "logits", "score", "pre of", "post of", "flip", "tokens +", "paths +", "node", "OV table",
    ],
}  # fmt: skip
EXCEPT = {  # what does not read what was made wrong
    "drop b_V": ["at the key = log-odds"],
    "drop b_O": ["at the key = log-odds"],
}


def _excepted(mutation, name):
    return any(piece in name for piece in EXCEPT.get(mutation, ()))


def test_every_mutation_is_caught_by_every_certificate_that_covers_it():
    live = live_model("gpt2")
    table = mutations.verdicts(freeze_all(live))  # its norms have gains and biases to get wrong
    assert all(table["none"].values())
    assert set(SEES) == set(mutations.MUTATIONS)
    for mutation, pieces in SEES.items():
        covering = [name for name in table["none"] if any(piece in name for piece in pieces)]
        covering = [name for name in covering if not _excepted(mutation, name)]
        assert covering
        missed = [name for name in covering if table[mutation][name]]
        assert not missed, (mutation, missed)


def test_flow_is_conserved_and_what_is_not_shown_is_counted(folded, dtype):
    tokens = torch.arange(4)
    everything = lf.flow_graph(folded, tokens, 3, 5, top_k=None, by="neuron").verify()
    small = 1e-10 if dtype == torch.float64 else 1e-4
    into, out = Counter(), Counter()
    for edge in everything.edges:
        into[edge.target] += edge.flow
        out[edge.source] += edge.flow
    for node in everything.nodes:
        assert abs(node.from_rest) < small
        assert abs(node.to_rest) < small
        if node.kind not in ("embed", "pos_embed"):
            assert abs(into[node.name] + node.from_biases - node.flow) < 10 * small
        if node.kind != "logit":
            assert abs(out[node.name] - node.flow) < 10 * small
    some = lf.flow_graph(folded, tokens, 3, 5, top_k=6).verify()
    assert len([n for n in some.nodes if n.kind in ("head", "mlp_out")]) == 6
    logit = some.node("logit")
    into = sum(edge.flow for edge in some.edges if edge.target == "logit")
    assert into + logit.from_biases + some.lost.item() == pytest.approx(some.total.item(), abs=1e-4)
    for node in some.nodes:  # the same nodes carry the same flow in both graphs
        if node.kind == "head":
            assert everything.node(node.name).flow == pytest.approx(node.flow, abs=10 * small)


def test_graphs_of_several_prompts_and_without_edges(folded):
    graph = lf.flow_graph(folded, torch.arange(12).view(2, 6), 3)
    for many in (graph.to_json, graph.to_networkx):
        with pytest.raises(DataError, match="of several prompts"):
            many()
    one = graph.select(prompt=0)
    empty = dataclasses.replace(one, ends=one.ends[:0], edge_flow=one.edge_flow[:0])
    assert list(empty.top().columns) == list(one.top().columns)


def test_a_flow_graph_goes_to_json_and_networkx(folded):
    graph = lf.flow_graph(folded, torch.arange(7), 3, top_k=5)
    plain = json.loads(graph.to_json())
    assert plain["conservation"]["holds"] is True
    assert len(plain["nodes"]) == len(graph.nodes)
    assert plain["lost"] == graph.lost.item()
    network = graph.to_networkx()
    assert network.number_of_edges() == len(graph.edges)
    assert network.nodes["logit"]["flow"] == pytest.approx(graph.total.item())
    edge = graph.edges[0]
    assert network.edges[edge.source, edge.target]["flow"] == edge.flow
    import networkx

    assert networkx.is_directed_acyclic_graph(network)


def test_the_affine_map_is_the_network_with_its_gates_held(live):
    """Against autograd through a run in which patterns and gates do not move."""
    folded = lf.fold(freeze_all(live))
    tokens = torch.arange(6)[None]
    found = lf.affine_map(folded, tokens[0], 3)
    _, cache = folded.run_with_cache(tokens)
    embedding = (cache["hook_embed"] + cache["hook_pos_embed"]).detach().requires_grad_(True)

    def hold_pattern(pattern, hook):
        return cache[hook.name].detach()

    hooks = [(f"blocks.{i}.attn.hook_pattern", hold_pattern) for i in range(folded.cfg.n_layers)]
    for layer, block in enumerate(folded.blocks):
        pre, post = (cache[f"blocks.{layer}.mlp.hook_{x}"].detach() for x in ("pre", "post"))
        block.mlp.act_fn = lambda x, gate=post / pre: x * gate
    with folded.hooks(hooks):
        logit = folded(embedding, start_at_layer=0)[0, -1, 3]
    logit.backward()
    torch.testing.assert_close(found.jacobian, embedding.grad[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logit, found.contributions.total, rtol=1e-4, atol=1e-5)
    expected = torch.linalg.vecdot(embedding[0], embedding.grad[0])
    torch.testing.assert_close(found.by_token, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.by_token.sum() + found.biases, logit.detach())


def test_paths_by_brute_force(folded):
    """One path of two heads, written out."""
    tokens = torch.arange(6)[None]
    paths = lf.expand_paths(folded, tokens[0], 3, top_k=None, expansions=10_000).verify()
    _, cache = folded.run_with_cache(tokens)
    pattern = [cache[f"blocks.{layer}.attn.hook_pattern"][0] for layer in range(3)]
    OV = [folded.W_V[layer] @ folded.W_O[layer] for layer in range(3)]
    looks = (pattern[2][1] @ pattern[0][3])[-1]
    for pos in range(6):
        moved = looks[pos] * cache["hook_embed"][0, pos]
        expected = moved @ OV[0][3] @ OV[2][1] @ folded.W_U[:, 3]
        found = paths[f"embed@{pos} > L0H3 > L2H1"]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    few = lf.expand_paths(folded, tokens[0], 3, top_k=5, expansions=3).verify()
    assert few.labels[-1] == "rest"
    assert len(few) == 6
    whole = lf.expand_paths(folded, tokens[0], 3, top_k=None, expansions=0).verify()
    by_head = lf.attribute_logits(folded, tokens[0], 3)
    torch.testing.assert_close(whole["L1H2"], by_head["L1H2"])


def test_capped_scores_are_refused_unless_the_slope_is_held():
    model, tokens = free_model("gemma2"), torch.arange(6)
    with pytest.raises(InexactError, match="the soft cap on the scores is not affine"):
        lf.attribute_scores(model, tokens, 1, 0)
    with pytest.warns(HeldWarning, match="the soft cap on the scores held"):
        lf.attribute_scores(lf.trace(model, tokens, hold=True), 1, 0).verify()
    lf.counterfactual_pattern(model, tokens, 1, 0, "embed").verify()  # exact through the cap
