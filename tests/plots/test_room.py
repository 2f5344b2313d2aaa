"""Figures of deep models, many tokens and long titles keep room for what is written on them."""

import html
from itertools import pairwise

import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch
from support.models import freeze_all, make_gpt2, make_tokenizer

import lnfree_interp as lf
from lnfree_interp.analysis.results import Contributions
from lnfree_interp.numerics import MeasuredError

DEJAVU = {"title": 9.6, "subtitle": 7.0}
"""The mean width of a letter in pixels, measured in pictures drawn with DejaVu Sans."""


def result(n_layers, level="sublayer", n_heads=0, **more):
    kinds = {"layer": ("layer",), "sublayer": ("attn_out", "mlp_out"), "head": ("mlp_out", "b_O")}
    components = [lf.Component("embed")]
    for layer in range(n_layers):
        components += [lf.Component("head", layer, i) for i in range(n_heads)]
        components += [lf.Component(kind, layer) for kind in kinds[level]]
    components.append(lf.Component("b_U"))
    values = torch.randn(len(components), generator=torch.Generator().manual_seed(0))
    return Contributions(values, tuple(components), values.sum(), level, **more)


def held(n_layers=30, **more):
    gap = MeasuredError(0.4, 0.16, torch.float32)
    return result(
        n_layers, of=("' Mary' - ' John'",), held=("ln_final",), gap=gap, dtype=torch.float32,
        prompts=(("When Mary and John went to the store,", " John gave a drink to"),), **more,
    )  # fmt: skip


def labels(axis):
    assert axis.tickmode == "array"  # otherwise plotly leaves labels out where it likes
    return list(axis.ticktext)


@pytest.mark.parametrize("level", ["layer", "sublayer"])
def test_every_bar_of_thirty_layers_has_its_label(level):
    one = result(30, level)
    figure = lf.plots.attribution(one)
    assert labels(figure.layout.xaxis) == [*one.labels, "logit"]
    assert list(figure.layout.xaxis.tickvals) == list(range(len(one) + 1))
    assert "have labels" not in figure.layout.title.subtitle.text


def test_the_largest_bars_have_their_values():
    one = result(30)
    (bars,) = lf.plots.attribution(one).data
    largest = one.values.abs().topk(10).indices.tolist()
    assert all(bars.text[i] == f"{one.values[i].item():+.2f}" for i in largest)
    assert bars.text[-1] == f"{one.total.item():+.2f}"
    assert bars.text.count("") > 40
    assert bars.textposition == "outside"


@pytest.mark.parametrize("n_layers", [5, 30])
def test_values_do_not_reach_the_labels_of_the_axis(n_layers):
    one = result(n_layers)
    low, high = lf.plots.attribution(one).layout.yaxis.range
    ends = torch.cat([torch.zeros(1), one.values.cumsum(0)])
    least = 0.05 if n_layers == 5 else 0.15
    assert min(ends.min() - low, high - ends.max()) > least * (ends.max() - ends.min())


def test_where_labels_would_touch_the_largest_have_theirs_and_the_figure_says_so():
    one = result(96)
    figure = lf.plots.attribution(one)
    found = list(figure.layout.xaxis.tickvals)
    largest = [*one.values.abs().tolist(), abs(one.total.item())]
    assert largest.index(max(largest)) in found
    width = lf.plots.style.PLOT / len(largest)
    assert all((b - a) * width >= 11 for a, b in pairwise(found))
    beside = [i for i in range(len(largest)) if i not in found]
    assert all(
        any(largest[j] >= largest[i] and abs(j - i) * width < 11 for j in found) for i in beside
    )
    subtitle = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert f"the largest have labels, {len(found)} of {len(largest)}" in subtitle


def test_every_layer_of_a_heatmap_has_its_label_and_large_heads_their_values():
    one = result(30, "head", n_heads=9)
    assert len(one) == 332
    figure = lf.plots.attribution(one)
    assert labels(figure.layout.yaxis) == [f"L{layer}" for layer in range(30)]
    assert labels(figure.layout.xaxis) == [f"H{head}" for head in range(9)]
    (heatmap,) = figure.data
    texts = [text for row in heatmap.text for text in row]
    heads = one.of_kind("head")
    at = int(heads.abs().argmax())
    assert texts[at] == f"{heads[at].item():.2f}"
    small = heads.abs() < 0.02 * heads.abs().max()
    assert small.any()
    assert all(texts[i] == "" for i in small.nonzero()[:, 0].tolist())


def test_a_long_prompt_keeps_the_labels_of_the_tokens_that_are_read(tmp_path):
    make_gpt2(n_positions=160).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    folded = lf.fold(freeze_all(lf.load(tmp_path)))
    tokens = torch.randint(300, (150,), generator=torch.Generator().manual_seed(0))
    by_source = lf.attribute_logits(folded, tokens, 5, by="source")
    figure = lf.plots.attribution(by_source)
    grid = torch.tensor(figure.data[0].z).abs().amax(0)
    assert int(grid.argmax()) in figure.layout.xaxis.tickvals
    assert len(labels(figure.layout.xaxis)) < 150
    flow = lf.plots.flow(lf.flow_graph(folded, tokens, 5, top_k=20))
    assert len(labels(flow.layout.xaxis)) < 150
    pattern = lf.plots.pattern(lf.counterfactual_pattern(folded, tokens, 2, 1, "L0H0"))
    assert len(labels(pattern.layout.yaxis)) == 64
    assert 10 < len(labels(pattern.layout.xaxis)) < 30
    lens = lf.plots.lens(lf.logit_lens(folded, tokens[None]))
    assert labels(lens.layout.yaxis)[0] == "embeddings"


def too_long(figure, width):
    title = figure.layout.title
    return [
        line
        for what, one in (("title", title), ("subtitle", title.subtitle))
        for line in one.text.split("<br>")
        if len(html.unescape(line)) * DEJAVU[what] > width
    ]


def test_no_line_of_a_title_is_wider_than_the_picture():
    short, long = lf.plots.attribution(result(30)), lf.plots.attribution(held())
    assert too_long(long, 900) == []
    assert "<br>" in long.layout.title.text
    text = long.layout.title.subtitle.text.replace("<br>", " ")
    assert "NOT exact: ln_final held, which misses 0.16 of the largest effect" in text
    grown = long.layout.height - short.layout.height
    assert grown == long.layout.margin.t - short.layout.margin.t > 0  # bars keep their room
    for figure in (short, long):
        above = 18 + 11 * figure.layout.title.text.count("<br>")  # plotly moves lines up
        assert (1 - figure.layout.title.y) * figure.layout.height == pytest.approx(above)


def test_an_escaped_letter_counts_once():
    prompts = (("<|im_start|>", "The Eiffel Tower is in"),)
    one = result(3, of=("' Paris' - ' London'",), prompts=prompts)
    title = lf.plots.attribution(one).layout.title
    assert title.text.endswith("after “&lt;|im_start|&gt;The Eiffel Tower is in”")
    assert "<br>" not in title.text


def test_a_narrow_picture_has_more_lines(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(go.Figure, "write_image", lambda figure, *_, **more: drawn.append(figure))
    figure = lf.plots.attribution(held())
    before = figure.to_json()
    lf.plots.save(figure, tmp_path / "narrow.png", width=500)
    assert too_long(drawn[0], 500) == []
    assert figure.to_json() == before
    monkeypatch.setattr(pio.renderers["png"], "width", 600)  # as show_in_notebooks sets it
    assert too_long(lf.plots.attribution(held()), 600) == []


def test_a_figure_of_ones_own_keeps_its_titles(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(go.Figure, "write_image", lambda figure, *_, **more: drawn.append(figure))
    for text in (None, "short", "a <b>long</b> title " * 20):
        lf.plots.save(go.Figure(layout_title_text=text), tmp_path / "own.png")
        assert drawn[-1].layout.title.text == text


def test_a_page_breaks_titles_by_itself():
    from lnfree_interp.plots.page import Section, page

    text = page("t", "l", [Section("s", content=[lf.plots.attribution(held())])])
    assert "John gave a drink to”</h3>" in text
    assert "<br>" not in text[text.index("<figure><h3>") : text.index('<p class="note">')]
