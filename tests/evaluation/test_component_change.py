"""What a fine-tuning rewrote, by component."""

import copy

import pytest
import torch
from support.loaded import folded_model, live_model

import lnfree_interp as lf
from lnfree_interp.errors import DataError
from lnfree_interp.models.sites import stock_weights


@pytest.fixture
def pair():
    """A model, and the same with one head and one norm moved."""
    before = live_model("gpt2")
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.blocks[1].attn.W_V[2, 3, 4] += 2.0
        after.blocks[1].attn.b_Q[2] -= 0.5
        after.blocks[2].ln2.w *= 1.1
    return before, after


def test_changes_are_where_they_were_made(pair):
    before, after = pair
    change = lf.component_change(before, after)
    frame = change.to_frame().set_index("component")
    assert set(frame.index[frame.largest > 0]) == {"L1H2", "blocks.2.ln2"}
    head = [W[2].flatten() for name, W in stock_weights(before).items()
            if name.startswith("blocks.1.attn.") and not name.endswith("b_O")]  # fmt: skip
    n, norm = sum(len(W) for W in head), torch.cat(head).norm().item()
    row = frame.loc["L1H2"]
    assert row.parameters == n
    assert row.largest == pytest.approx(2.0, rel=1e-12)
    assert row.mean_abs == pytest.approx((2.0 + 8 * 0.5) / n, rel=1e-12)
    assert row.relative == pytest.approx((4.0 + 8 * 0.25) ** 0.5 / norm, rel=1e-12)
    ln2 = before.blocks[2].ln2
    both = torch.cat([ln2.w, ln2.b])
    assert frame.loc["blocks.2.ln2"].relative == pytest.approx(
        (0.1 * ln2.w.norm() / both.norm()).item(), rel=1e-12
    )
    assert frame.parameters.sum() == sum(W.numel() for W in stock_weights(before).values())
    assert change.top(2, "largest").component.tolist() == ["L1H2", "blocks.2.ln2"]
    assert "L1H2" in repr(change)


@pytest.mark.parametrize("by", ["relative", "mean_abs", "largest"])
def test_a_kind_in_a_block_is_measured_as_one(pair, by):
    before, after = pair
    change = lf.component_change(before, after)
    found = change.by_layer(by)
    assert found["ln_final"] == {None: 0.0}
    assert found["head"][0] == found["head"][2] == 0.0
    heads = [
        torch.cat([W.flatten() for name, W in stock_weights(model).items()
                   if name.startswith("blocks.1.attn.") and not name.endswith("b_O")])
        for model in pair
    ]  # fmt: skip
    moved = heads[1] - heads[0]
    expected = {
        "relative": moved.norm() / heads[0].norm(), "mean_abs": moved.abs().mean(),
        "largest": moved.abs().max(),
    }  # fmt: skip
    assert found["head"][1] == pytest.approx(expected[by].item(), rel=1e-12)


def test_it_reads_every_form_with_norms_and_what_trained_them(pair):
    before, after = pair
    sited = lf.with_norm_sites(after)
    lf.freeze_site(sited, "ln_final", 2.0)
    there = lf.component_change(before, sited)
    torch.testing.assert_close(there.values(), lf.component_change(before, after).values())
    same = lf.component_change(lf.with_norm_sites(before), before)
    assert not same.values("largest").any()
    assert not same.values("relative").any()
    with torch.no_grad():
        before.blocks[0].mlp.b_in.zero_()
        before.blocks[0].attn.b_O.zero_()
    new = lf.component_change(before, after).to_frame().set_index("component")
    assert new.loc["blocks.0.attn.b_O"].relative == float("inf")


def test_what_was_rewritten_without_training_is_refused(pair):
    before, _ = pair
    with pytest.raises(
        DataError, match=r"ln1\.w is .* before and missing after.*before `lf\.fold`"
    ):
        lf.component_change(before, folded_model("gpt2"))
    with pytest.raises(DataError, match="differ in more than values"):
        lf.component_change(before, live_model("gpt2", n_layer=2))
    change = lf.component_change(before, before)
    with pytest.raises(DataError, match="no change is measured by 'l2'"):
        change.top(3, "l2")
    with pytest.raises(DataError, match="at least 1"):
        change.top(0)


def test_the_figure_has_a_panel_a_kind_and_names_the_rest(pair):
    change = lf.component_change(*pair)
    figure = lf.plots.component_change({"lnfree": change, "vanilla": change}, "largest")
    panels = [note.text for note in figure.layout.annotations]
    assert panels == ["ln1", "ln2", "head", "attn.b_O", "mlp"]
    assert len(figure.data) == 2 * len(panels)
    heads = next(line for line in figure.data if line.yaxis == "y3")
    assert list(heads.x) == [0, 1, 2]
    assert list(heads.y) == list(change.by_layer("largest")["head"].values())
    shown = figure.layout.title.subtitle.text
    assert "largest absolute change of a parameter" in shown
    assert all(name in shown for name in ("embed", "unembed", "ln_final"))
    with pytest.raises(DataError, match="nothing to draw"):
        lf.plots.component_change({})
