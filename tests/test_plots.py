"""Figures show the numbers that they were given."""

import pytest
import torch

import lnfree_interp as lf
from lnfree_interp.errors import DataError
from lnfree_interp.removal.schedule import sequential_sites


def attributions(folded, level):
    return lf.attribute_logits(folded, ["return", "for i in"], ["r", "i"], ["e", "n"], by=level)


@pytest.mark.parametrize("level", ["block", "neuron"])
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
    result = lf.attribute_logits(folded, "<script>return", "r", by="block")
    title = lf.plots.attribution(result).layout.title
    assert "&lt;script&gt;return" in title.text
    assert "<script>" not in title.text
    assert "parts minus logit" in title.subtitle.text


def test_direct_effects_has_a_panel_a_model(folded, live, tokens):
    results = {
        "original": lf.direct_effects(live, tokens),
        "lnfree": lf.direct_effects(folded, tokens),
    }
    figure = lf.plots.direct_effects(results, points=50)
    assert [len(trace.x) for trace in figure.data] == [2, 50, 2, 50]
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert texts[0].startswith("original: NMAE")
    assert texts[1].startswith("LN-free: NMAE")


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
        "qk frozen": 3,
        "v frozen": 3,
        "ln_final frozen": 1,
    }
    assert marks["ln_final frozen"] == [recipe.events[-1].step]
