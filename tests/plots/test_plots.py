"""Figures show the numbers that they were given."""

import html
from dataclasses import replace

import pytest
import torch
from support.loaded import folded_model
from support.probing import SITE, sentences

import lnfree_interp as lf
from lnfree_interp.errors import DataError, OutputError
from lnfree_interp.removal.schedule import sequential_sites


@pytest.fixture
def dtype():
    """In which numbers are drawn makes no difference."""
    return torch.float64


def attributions(folded, level):
    return lf.attribute_logits(folded, ["return", "for i in"], ["r", "i"], ["e", "n"], by=level)


@pytest.mark.parametrize("level", ["sublayer", "neuron"])
def test_waterfall_bars_add_up_to_the_logit(folded, level):
    result = attributions(folded, level).select(1)
    (waterfall,) = lf.plots.attribution(result, top=5).data
    *bars, total = waterfall.y
    assert sum(bars) == pytest.approx(result.total.item(), rel=1e-4)
    assert total == pytest.approx(result.total.item())
    assert list(waterfall.measure) == ["relative"] * len(bars) + ["total"]
    if level == "neuron":
        assert len(bars) == 6
        assert waterfall.x[5] == f"{len(result) - 5} others"


def test_heatmap_holds_every_head(folded):
    result = attributions(folded, "head").select(0)
    (heatmap,) = lf.plots.attribution(result).data
    assert torch.tensor(heatmap.z).flatten().tolist() == pytest.approx(
        result.of_kind("head").tolist()
    )
    assert heatmap.zmid == 0
    assert heatmap.zmin == -heatmap.zmax


def test_a_batch_is_refused(folded):
    with pytest.raises(DataError, match="select"):
        lf.plots.attribution(attributions(folded, "head"))


def test_titles_say_what_is_shown_and_markup_stays_text(folded):
    result = lf.attribute_logits(folded, "<script>return", "r", by="sublayer")
    title = lf.plots.attribution(result).layout.title
    assert "&lt;script&gt;return" in title.text
    assert "<script>" not in title.text
    assert "parts minus whole" in title.subtitle.text


def test_direct_effects_has_a_panel_a_model(folded, live, tokens):
    results = {
        "original": lf.direct_effects(live, tokens),
        "lnfree": lf.direct_effects(folded, tokens),
    }
    figure = lf.plots.direct_effects(results, points=50)
    assert [len(trace.x) for trace in figure.data] == [2, 50, 2, 50]
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert texts[0].startswith("original<br>NMAE")
    assert texts[1].startswith("LN-free<br>NMAE")


def test_training_curve_shows_losses_and_marks_every_event(live):
    data = torch.randint(300, (16, 20), generator=torch.Generator().manual_seed(0))
    recipe = lf.recipes.distilled(sequential_sites(3), steps=12)
    runs = {
        "vanilla": lf.remove_norms(live, recipe.vanilla(), data, progress=False),
        "lnfree": lf.remove_norms(live, recipe, data, progress=False),
    }
    figure = lf.plots.training_curve(runs, window=3)
    lines = {trace.name: trace for trace in figure.data if trace.mode != "markers" and trace.name}
    losses = [record.loss for record in runs["lnfree"].history]
    assert lines["LN-free"].y[5] == pytest.approx(sum(losses[3:6]) / 3)
    marks = {trace.name: list(trace.x) for trace in figure.data if trace.mode == "markers"}
    assert {name: len(steps) for name, steps in marks.items()} == {
        "ln2 frozen": 3,
        "ln1.qk frozen": 3,
        "ln1.v frozen": 3,
        "ln_final frozen": 1,
    }
    assert marks["ln_final frozen"] == [recipe.events[-1].step]
    assert figure.layout.title.text == "Removing the norms"
    assert lf.plots.training_curve(runs["vanilla"]).layout.title.text == "Training"


def test_figures_of_a_run_know_the_norms_inside_sublayers(live):
    data = torch.randint(300, (16, 20), generator=torch.Generator().manual_seed(0))
    variant = lf.to_sub_ln(lf.to_peri_ln(live).model).model
    recipe = lf.recipes.distilled(variant, steps=40)
    run = lf.remove_norms(variant, recipe, data, progress=False, log_every=5)
    names = {line.name for line in lf.plots.training_curve(run).data}
    assert {"attn.inner frozen", "mlp.inner frozen", "ln1_post frozen"} <= names
    kinds = {line.name for line in lf.plots.sigma_drift(run).data}
    assert {"attn.inner", "mlp.inner", "ln2_post", "ln1.v"} <= kinds


@pytest.fixture
def question(folded):
    return folded, "for i in range", "i", "n"


def test_heads_by_token_and_what_is_left(question):
    result = lf.attribute_logits(*question, by="source")
    figure = lf.plots.attribution(result)
    (heatmap,) = figure.data
    assert len(heatmap.y) == 12
    assert list(heatmap.x) == [f"{i} {t}" for i, t in enumerate(shown(result.prompts[0]))]
    row = list(heatmap.y).index("L1H2")
    found = torch.tensor(heatmap.z)[row]
    expected = [result[f"L1H2@{pos}"].item() for pos in range(len(heatmap.x))]
    assert found.tolist() == pytest.approx(expected)
    assert f"everything else {result.total - torch.tensor(heatmap.z).sum():+.2f}" in (
        figure.layout.title.subtitle.text
    )


def shown(tokens):
    return [html.escape(token.replace(" ", "·")) for token in tokens]


def test_tokens_and_biases_add_up_to_the_logit(question):
    result = lf.affine_map(*question)
    (bars,) = lf.plots.attribution(result).data
    assert sum(bars.y) == pytest.approx(result.contributions.total.item(), rel=1e-4)
    assert bars.x[-1] == "biases"
    view = lf.plots.circuits.tokens(result)._repr_html_()
    assert "ColoredTokens" in view


def test_paths_as_bars_and_as_a_sankey(question):
    result = lf.expand_paths(*question, top_k=8)
    (bars,) = lf.plots.attribution(result, top=5).data
    assert sum(bars.y[:-1]) == pytest.approx(result.total.item(), rel=1e-4)
    assert bars.x[5] == "all others"
    (sankey,) = lf.plots.paths(result).data
    logit = list(sankey.node.label).index("logit")
    into = [
        value for value, target in zip(sankey.link.customdata, sankey.link.target, strict=True)
        if target == logit
    ]  # fmt: skip
    assert sum(into) == pytest.approx(result.total.item(), rel=1e-4)
    assert all(value > 0 for value in sankey.link.value)
    assert len(set(zip(sankey.node.x, sankey.node.y, strict=True))) == len(sankey.node.label)
    assert all(0 < y < 1 for y in sankey.node.y)
    with pytest.raises(DataError, match="expand_paths"):
        lf.plots.paths(lf.attribute_logits(*question))


def test_flow_shows_every_node_and_its_edges(question):
    result = lf.flow_graph(*question, top_k=6)
    figure = lf.plots.flow(result)
    *lines, nodes = figure.data
    assert len(nodes.x) == len(result.nodes)
    assert len(lines) == len(result.edges)
    widest = max(result.edges, key=lambda edge: abs(edge.flow))
    assert lines[-1].text == f"{widest.source} to {widest.target}: {widest.flow:+.3f}"
    heights = dict(zip([text.partition(":")[0] for text in nodes.hovertext], nodes.y, strict=True))
    assert heights["embed@0"] < heights["logit"]


def test_scores_keep_what_is_not_shown(folded):
    result = lf.attribute_scores(folded, "for i in range(10):", 2, 1, by="neuron")
    (heatmap,) = lf.plots.scores(result, key=2, top=5).data
    assert torch.tensor(heatmap.z).shape == (6, 6)
    assert torch.tensor(heatmap.z).sum().item() == pytest.approx(result.total[2].item(), abs=1e-5)
    best = lf.plots.scores(result).layout.xaxis.title.text
    assert f"{result.keys[int(result.total.argmax())]} " in best


def test_the_key_that_is_shown_is_one_that_is_seen(folded):
    """Though all scores are negative, and that of a key which only a longer prompt has is zero."""
    both = lf.attribute_scores(folded, [torch.arange(3), torch.arange(6)], 2, 1)
    short = both.select(prompt=0)
    low = replace(short, total=short.total - (short.log_pattern > -torch.inf) * 100.0)
    shown = lf.plots.scores(low).layout.xaxis.title.text
    assert f"at the key, {int(short.log_pattern.argmax())} " in shown
    mean = both.by_query().mean()
    assert mean.select(key=1).total == mean.total[1]


def test_patterns_before_and_after(folded):
    result = lf.counterfactual_pattern(folded, "for i in <range>", 2, 1, "L0H0")
    before, after, change = lf.plots.pattern(result).data
    weights = [torch.tensor(panel.z) for panel in (before, after, change)]
    torch.testing.assert_close(weights[2], weights[1] - weights[0])
    torch.testing.assert_close(weights[0].double(), result.original.double())
    assert not any("<r" in label for label in before.x)
    assert "AttentionHeads" in lf.plots.circuits.heads(result)._repr_html_()


def test_no_token_closes_the_script_it_is_written_in(folded):
    result = lf.affine_map(folded, "</script><script>alert(1)", "i")
    page = lf.plots.circuits.tokens(result)._repr_html_()
    props = page[page.rindex("CircuitsVis.render(") :]
    assert "\\u003c" in props
    assert props.count("</script>") == 1  # the page's own
    assert "unpkg" not in props


def test_lens(folded):
    tokens = folded.to_tokens("for i in range(10): print(i)")
    result = lf.logit_lens(folded, tokens)
    (heatmap,) = lf.plots.lens(result, start=2, stop=6).data
    assert torch.tensor(heatmap.z).shape == (4, 4)
    assert heatmap.y[0] == "embeddings"
    final = folded(tokens)[0]
    assert heatmap.z[-1][0] == pytest.approx(final[2, tokens[0, 3]].item(), rel=1e-4)
    top = folded.tokenizer.decode([int(final[2].argmax())])
    assert heatmap.text[-1][0] == html.escape(top.replace(" ", "·").replace("\n", "↵"))[:6]
    with pytest.raises(DataError, match="targets"):
        lf.plots.lens(result, prompt=1)


def test_evaluations_as_curves(live, folded, tokens):
    evaluation = lf.evaluate({"original": live, "lnfree": folded}, tokens, neurons=0, pairs=0)
    norms = lf.plots.residual_norms(evaluation)
    assert len(norms.data) == 6
    expected = evaluation.models["lnfree"].residual_norms.others_max.tolist()
    assert list(norms.data[5].y) == pytest.approx(expected)
    by_position = lf.plots.loss_by_position(evaluation)
    mean = evaluation.models["original"].cross_entropy.by_position[:16].mean().item()
    assert by_position.data[0].y[15] == pytest.approx(mean)
    assert by_position.data[0].line.color != by_position.data[1].line.color


def test_drift_of_frozen_sites(live):
    data = torch.randint(300, (16, 20), generator=torch.Generator().manual_seed(0))
    recipe = lf.recipes.distilled(sequential_sites(3), steps=12)
    run = lf.remove_norms(live, recipe, data, progress=False, log_every=2)
    figure = lf.plots.sigma_drift(run)
    looked = [record for record in run.history if record.probes.get("drift")]
    assert {trace.text[0] for trace in figure.data} == set(looked[-1].probes["drift"])
    for trace in figure.data:
        assert trace.y[-1] == pytest.approx(looked[-1].probes["drift"][trace.text[0]])
        assert trace.x[-1] == looked[-1].step
    control = lf.remove_norms(live, recipe.vanilla(), data, progress=False, log_every=0)
    with pytest.raises(DataError, match="no drift"):
        lf.plots.sigma_drift(control)


def test_big_models_stay_readable():
    components = [lf.Component("head", i, j) for i in range(48) for j in range(25)]
    values = torch.randn(1200, generator=torch.Generator().manual_seed(0))
    big = lf.Contributions(values, tuple(components), values.sum(), "head")
    figure = lf.plots.attribution(big)
    assert figure.layout.height < 1000
    assert figure.data[0].texttemplate is None


def test_pictures(question, tmp_path):
    figure = lf.plots.attribution(lf.attribute_logits(*question, by="sublayer"))
    page = lf.plots.save(figure, tmp_path / "figure.html")
    assert "cdn.plot.ly" not in page.read_text()[-2000:]
    with pytest.raises(OutputError, match=r"\.png"):
        lf.plots.save(figure, tmp_path / "figure.jpg")
    (tmp_path / "folder.html").mkdir()
    for bad in (tmp_path / "nowhere" / "figure.png", tmp_path / "folder.html"):
        with pytest.raises(OutputError, match="a folder"):
            lf.plots.save(figure, bad)
    assert lf.plots.save(figure, tmp_path / "LOUD.HTML").is_file()


def test_the_lens_shows_the_end(folded):
    tokens = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    result = lf.logit_lens(folded, tokens)
    figure = lf.plots.lens(result)
    assert [figure.data[0].x[i].split()[0] for i in (0, -1)] == ["16", "39"]
    assert "positions 16 to 39 of 40" in figure.layout.title.subtitle.text
    assert len(lf.plots.lens(result, start=3).data[0].x) == 24
    assert len(lf.plots.lens(result, start=30).data[0].x) == 10
    assert len(lf.plots.lens(result, stop=5).data[0].x) == 5


def test_quotes_are_shown_as_quotes(folded):
    result = lf.attribute_logits(folded, 'print("a', "r", by="source")
    assert any('"' in label for label in lf.plots.attribution(result).data[0].x)
    assert "&quot;" not in lf.plots.attribution(result).to_json()


def test_what_is_no_logit_is_not_called_one(folded):
    neuron = lf.plots.attribution(lf.attribute_neuron(folded, "for i in", 2, 0, by="sublayer"))
    assert neuron.layout.yaxis.title.text == "cumulative pre"
    assert neuron.data[0].x[-1] == "pre"
    assert neuron.layout.title.text.startswith("pre of L2N0")
    direction = folded.W_U[:, 5]
    stream = lf.decompose_residual(folded, "for i in", onto=direction, by="sublayer")
    assert lf.plots.attribution(stream).layout.yaxis.title.text == "cumulative projection"
    with pytest.raises(DataError, match="onto=direction"):
        lf.plots.attribution(lf.decompose_residual(folded, "for i in", by="sublayer"))
    with pytest.raises(DataError, match="at least 1"):
        lf.plots.attribution(attributions(folded, "neuron").select(0), top=0)


def test_figures_take_what_the_calls_return(folded, live, tokens):
    effects = lf.direct_effects(folded, tokens)
    assert len(lf.plots.direct_effects(effects, points=9).data) == 2
    evaluation = lf.evaluate({"live": live, "free": folded}, tokens, pairs=0, neurons=0)
    assert len(lf.plots.direct_effects(evaluation, points=9).data) == 4
    without = lf.evaluate(live, tokens, pairs=0, neurons=0, effects=False)
    for nothing in ({}, without):
        with pytest.raises(DataError, match="no direct effects"):
            lf.plots.direct_effects(nothing)
    with pytest.raises(DataError, match="no step"):
        lf.plots.training_curve({})


def test_a_broken_model_has_no_flow_to_draw(folded):
    with torch.no_grad():
        folded.unembed.W_U[0, 0] = float("nan")
    graph = lf.flow_graph(folded, "for i in", 0)
    with pytest.raises(DataError, match="no finite number"):
        lf.plots.flow(graph)


def test_a_deep_model_still_fits_on_a_page():
    from lnfree_interp.analysis.certificates import Certificate
    from lnfree_interp.analysis.flow_results import FlowGraph
    from lnfree_interp.numerics import MeasuredError

    certificate = Certificate("", MeasuredError(0.0, 0.0, torch.float32))
    components = (*(lf.Component("mlp_out", layer) for layer in range(48)), lf.Component("b_U"))
    flow, nothing = torch.ones(49), torch.zeros(49)
    graph = FlowGraph(
        components, (*(0,) * 48, None), flow, nothing, nothing, nothing,
        torch.empty(0, 2, dtype=torch.long), torch.empty(0), certificate, ("b",), (("a",),),
        torch.tensor(1.0),
    )  # fmt: skip
    assert lf.plots.flow(graph).layout.height < 1600


@pytest.fixture(scope="module")
def probes():
    model = folded_model("gpt2", tokenizer=True)
    planted = lf.planted_reading_times(model, SITE, words=sentences(30))
    targets = {"a < b": planted.targets["planted_FFD"], "TRT": planted.targets["planted_TRT"]}
    return lf.fit_probes(model, targets, words=planted.words, progress=False)


@pytest.mark.parametrize("by", ["mae", "r2"])
def test_probes_by_site_beside_what_needs_no_model(probes, by):
    figure = lf.plots.probes(probes, by)
    assert [line.name for line in figure.data[:4]] == [
        "mean of the target", "features of words", "stream", "ensemble of both",
    ]  # fmt: skip
    expected = [getattr(one, by).loc["TRT", "stream"] for one in probes.values()]
    assert list(figure.data[6].y) == pytest.approx(expected)
    assert [line.line.dash for line in figure.data[:4]] == ["dot", "dot", "solid", "solid"]
    assert len(set(figure.data[4].y)) == 1
    assert list(figure.layout.xaxis.ticktext) == ["0 pre", "0 post", "1 post", "2 post"]
    assert [one.text for one in figure.layout.annotations] == ["a &lt; b", "TRT"]
    assert figure.layout.xaxis.title.text == "site"
    unit = "mean absolute error" if by == "mae" else "R2"
    assert figure.layout.yaxis.title.text == unit
    subtitle = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert subtitle.startswith(unit)
    assert ("in the units of the targets" in subtitle) == (by == "mae")
    assert "5 folds; ridge, last token of 120 words in 30 sentences" in subtitle


def test_one_probe_is_drawn_as_bars(probes):
    one = probes[SITE]
    figure = lf.plots.probes(one)
    assert [bar.y[0] for bar in figure.data[4:]] == pytest.approx(
        one.mae.loc["TRT", ["mean", "words", "stream", "ensemble"]].tolist()
    )
    assert f"ridge at {SITE}" in figure.layout.title.subtitle.text.replace("<br>", " ")
    for bad, said in (
        (lambda: lf.plots.probes({}), "nothing to draw"),
        (lambda: lf.plots.probes(one, "rmse"), "by='rmse'"),
        (lambda: lf.plots.probes(probes | {"x": replace(one, names=("a", "b"))}), "different"),
    ):
        with pytest.raises(DataError, match=said):
            bad()


def test_norm_banks_shows_the_losses_and_colours_what_was_forgotten():
    one = torch.tensor([[1.0, 5.0], [3.0, 2.0]]).double()
    other = torch.tensor([[0.5, 6.0], [0.5, 4.0]]).double()
    names = ("a<b", "c")
    first = lf.BankEvaluation(names, names, "last", one, one / 10)
    second = lf.BankEvaluation(names, names, "keys", other, other / 10)
    figure = lf.plots.norm_banks({"first": first, "x<y": second})
    assert torch.equal(torch.tensor([trace.text for trace in figure.data]).double(),
                       torch.stack([one, other]))  # fmt: skip
    assert torch.tensor(figure.data[0].z).tolist() == [[0.5, 3.0], [2.5, 0.0]]
    assert torch.tensor(figure.data[1].z).tolist() == [[0.0, 4.0], [0.0, 2.0]]
    assert figure.data[0].zmax == figure.data[1].zmax == 4.0
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == ["first<br>forgetting 1.000 nats", "x&lt;y<br>forgetting 0.000 nats"]
    assert figure.data[0].x == ("a&lt;b", "c")
    accuracy = lf.plots.norm_banks(first, of="accuracy")
    assert torch.tensor(accuracy.data[0].z).flatten().tolist() == pytest.approx([0.2, 0, 0, 0.3])
    with pytest.raises(DataError, match="nothing to draw"):
        lf.plots.norm_banks({})
    with pytest.raises(DataError, match="'loss' or 'accuracy'"):
        lf.plots.norm_banks(first, of="other")
