"""Predicted and measured deletions, against attribution and against hooks of TransformerLens."""

import math

import pandas as pd
import pytest
import torch
from support.loaded import frozen_model, live_model
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.errors import DataError, InexactError
from lnfree_interp.evaluation import deletion
from lnfree_interp.evaluation.deletion_results import KINDS, agreement
from lnfree_interp.numerics import TOLERANCE

PROMPTS = [[7, 4, 9, 31, 2, 15], [5, 6, 8, 9, 12, 44, 3, 17], [1, 2, 3]]
TEXT = torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(2))
HEADS = ["L1H1", "L2H0", "L2H3"]
ARCHITECTURES = ["gpt2", "neox", "llama-grouped", "mistral"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    """Learned and rotary positions, parallel blocks, RMSNorm, grouped queries, a window."""
    return live_model(request.param)


def check(model, prompts=PROMPTS, heads=HEADS, **more):
    more = {"k": (1, 2, 4), "draws": 2, "progress": False} | more
    return lf.deletion_check(model, prompts, heads, **more)


def forms(model, all_of_them):
    sites = [*(f"blocks.{layer}.ln1.qk" for layer in (1, 2)), "ln_final"]
    yield lf.freeze_for(model, sites, TEXT, progress=False).model
    frozen = freeze_all(model)
    yield lf.fold(frozen)
    if all_of_them:
        yield frozen
        yield lf.frozen_form(frozen)


# What is exact


@pytest.mark.parametrize(
    "more", [{}, {"answers": 3, "foils": 5}, {"by": "neuron"}, {"by": "source"}]
)
def test_predictions_are_what_deletions_do_where_the_question_is_exact(model, more):
    for exact in forms(model, not more):
        found = check(exact, **more).verify(1e-12)
        assert found.held == ()
        summary = found.summary()
        assert list(summary["kind"].unique()) == list(KINDS)
        assert (summary["nmae"] < 1e-12).all()
        assert (summary["correlation"] > 1 - 1e-12).all()
        assert (summary["sign"] == 1).all()
        assert summary["slope"].tolist() == pytest.approx([1.0] * len(summary), rel=1e-9)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_in_float32_rounding_is_all_that_is_missed(kind):
    model = live_model(kind, torch.float32)
    found = check(lf.fold(freeze_all(model))).verify()
    assert (found.summary(["kind"])["nmae"] < TOLERANCE[torch.float32]).all()


def test_a_live_norm_is_held_for_the_prediction_and_not_in_the_measurement(model):
    found = check(model)
    assert found.held == ("blocks.1.ln1.qk", "blocks.2.ln1.qk", "ln_final")
    assert (found.summary(["kind"])["nmae"] > 0.02).all()
    with pytest.raises(InexactError, match="with blocks"):
        found.verify()
    assert "and 2 more held" in repr(found)
    assert "held" in found.to_frame()


# What is predicted, and for what


def test_predictions_are_sums_of_the_shares_of_attribution(model):
    found = check(model, answers=[3, 4, 5], foils=7, heads=HEADS[:2], draws=1).to_frame()
    for i, prompt in enumerate(PROMPTS[:2]):
        trace = lf.trace(model, prompt, hold=True)
        known = {}
        some = found[(found["prompt"] == i) & (found["kind"] != "pattern")]
        for row in some.itertuples():
            target = lf.LogitDifference((3, 4, 5)[i], 7)
            if row.head:
                head = lf.Component.parse(row.head)
                target = lf.Score(head.layer, head.index, -1, row.key, row.side)
            if target not in known:
                known[target] = trace.attribute(target)
            shares = known[target]
            labels = row.deleted.split(", ")
            assert len(set(labels)) == row.k
            expected = sum(shares[label].item() for label in labels)
            assert row.predicted == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert row.before == pytest.approx(shares.total.item(), rel=1e-9)
            in_stream = [x for x in shares.components if x.in_stream]
            sizes = sorted((abs(shares[x].item()) for x in in_stream), reverse=True)
            if row.chosen == "top":
                here = sorted((abs(shares[label].item()) for label in labels), reverse=True)
                assert here == pytest.approx(sizes[: row.k], rel=1e-9)


def test_the_key_is_the_most_attended_but_the_first_and_the_query(model):
    found = check(model).to_frame()
    for i, prompt in enumerate(PROMPTS):
        _, cache = model.run_with_cache(torch.tensor([prompt]))
        for label in HEADS:
            head = lf.Component.parse(label)
            weights = cache["pattern", head.layer][0, head.index, -1]
            rows = found[(found["prompt"] == i) & (found["head"] == label)]
            assert rows["key"].unique().tolist() == [1 + int(weights[1:-1].argmax())]
            weight = weights[rows["key"].iloc[0]].item()
            assert rows[rows["kind"] == "pattern"]["before"].unique() == pytest.approx(weight)


# What is measured, by hooks of TransformerLens


def written(model, cache, label):
    """What a component writes, from TransformerLens' own cache."""
    component = lf.Component.parse(label)
    if component.kind == "head":
        attn = model.blocks[component.layer].attn
        return cache["z", component.layer][0, :, component.index] @ attn.W_O[component.index]
    if component.kind == "b_O":
        return model.blocks[component.layer].attn.b_O.expand(cache["embed"].shape[1], -1)
    return cache[component.kind, component.layer][0]


def by_hooks(model, prompt, row):
    """What a deletion changes: taken from the one input of the one head's queries or keys."""
    tokens = torch.tensor([prompt])
    _, cache = model.run_with_cache(tokens)
    gone = torch.stack([written(model, cache, x) for x in row.deleted.split(", ")]).sum(0)
    at = row.key if row.side == "key" else len(prompt) - 1
    head = lf.Component.parse(row.head) if row.head else None

    def delete(x, hook):
        if head is None:
            x[:, at] -= gone[at]
        else:
            x[:, at, head.index * x.shape[2] // model.cfg.n_heads] -= gone[at]
        return x

    if head is None:
        name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        after = model.run_with_hooks(tokens, fwd_hooks=[(name, delete)])
        return (model(tokens) - after)[0, -1, 3].item()
    kept = {}

    def keep(x, hook):
        kept[hook.name] = x[0, head.index, -1, row.key].item()

    what = "hook_pattern" if row.kind == "pattern" else "hook_attn_scores"
    name = f"blocks.{head.layer}.attn.{what}"
    letter = "q" if row.side == "query" else "k"
    hooks = [(f"blocks.{head.layer}.hook_{letter}_input", delete), (name, keep)]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    return cache[name][0, head.index, -1, row.key].item() - kept[name]


@pytest.mark.parametrize("form", ["live", "frozen"])
def test_measurements_are_those_by_hooks_of_one_heads_input(model, form):
    given = lf.with_norm_sites(model) if form == "live" else freeze_all(model)
    found = check(given, answers=3, draws=1).to_frame()
    given.set_use_split_qkv_input(True)
    for row in (
        found.groupby(["kind", "side", "head", "chosen"]).sample(1, random_state=0).itertuples()
    ):
        expected = by_hooks(given, PROMPTS[row.prompt], row)
        assert row.measured == pytest.approx(expected, rel=1e-8, abs=1e-12), row


def test_checking_leaves_the_model_as_it_was(model):
    before = model(TEXT)
    check(model)
    assert torch.equal(model(TEXT), before)


# Every way to get it wrong is noticed


def _enlarged(right):
    return lambda *a: (1.01 * (found := right(*a))[0], found[1])


def _of_the_other_side(right):
    return lambda parts, side, *a: right(parts, {"query": "key", "key": "query"}[side], *a)


def _of_the_next_key(right):
    return lambda parts, side, by, q, key: right(parts, side, by, q, key - 1)


def _without_the_last(right):
    def wrong(parts, components, shares, draw):
        for found in right(parts, components, shares, draw):
            found.rows[-1] = 0
            yield found

    return wrong


def _at_random(right):
    return lambda parts, wanted: (torch.randn_like((found := right(parts, wanted))[0]), found[1])


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("_shares", _enlarged), ("_shares", _of_the_other_side), ("_shares", _of_the_next_key),
        ("_deletions", _without_the_last), ("expand", _at_random), ("project", _enlarged),
    ],
)  # fmt: skip
def test_every_mutation_is_caught(monkeypatch, name, mutation):
    model = frozen_model("llama-grouped")
    check(model).verify()
    monkeypatch.setattr(deletion, name, mutation(getattr(deletion, name)))
    with pytest.raises((InexactError, IndexError, RuntimeError)):
        check(model).verify()


# The sample


def test_the_sample_is_seeded_and_the_batch_changes_nothing(model):
    more = {"heads": None, "draws": 1, "k": (1, 4)}
    found = check(model, **more).to_frame()
    same = check(model, **more, batch=2).to_frame()
    numbers = ["before", "predicted", "measured"]
    order = ["prompt", "head", "side", "kind", "k", "chosen", "deleted"]
    found, same = (x.sort_values(order, ignore_index=True) for x in (found, same))
    pd.testing.assert_frame_equal(found.drop(columns=numbers), same.drop(columns=numbers))
    pd.testing.assert_frame_equal(found[numbers], same[numbers], rtol=1e-9, atol=1e-12)
    other = check(model, **more, seed=1).to_frame()
    assert set(other["deleted"]) != set(found["deleted"])
    assert set(found["head"]) == {
        "",
        *(f"L{layer}H{head}" for layer in (1, 2) for head in range(4)),
    }
    assert len(found) == 2 * 2 * 3 * (8 * 2 * 2 + 1)


def test_heads_are_drawn_from_all_layers_but_the_first():
    config = {"num_hidden_layers": 14, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = live_model("llama", torch.float32, **config)
    drawn = deletion._draw_heads(lf.trace(model, [1, 2]).view, 0)
    assert sorted({layer for layer, _ in drawn}) == list(range(1, 14))
    assert len(set(drawn)) == len(drawn) == 26
    assert drawn != deletion._draw_heads(lf.trace(model, [1, 2]).view, 1)


def test_a_deletion_that_leaves_nothing_is_left_out(model):
    found = check(model, heads=["L0H1"], k=(1, 2, 4)).to_frame()
    n = 2 if model.cfg.positional_embedding_type == "standard" else 1
    assert set(found[found["head"] != ""]["k"]) == set(range(1, n))
    with pytest.raises(DataError, match="leaves nothing"):
        check(model, k=1000)


# The result


def test_agreement_by_hand():
    found = agreement(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([2.0, 4.0, 0.5]))
    assert found["nmae"] == pytest.approx((1 + 2 + 1.5) / 6.5)
    assert found["sign"] == pytest.approx(2 / 3)
    p, m = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([2.0, 4.0, 0.5])
    expected = torch.corrcoef(torch.stack([p, m]))[0, 1].item()
    assert found["correlation"] == pytest.approx(expected, rel=1e-6)
    slope = torch.linalg.lstsq(torch.stack([p, torch.ones(3)], 1), m[:, None]).solution[0, 0]
    assert found["slope"] == pytest.approx(slope.item(), rel=1e-5)
    nothing = agreement(torch.tensor([1e-9, -2e-9]), torch.zeros(2))  # all measured is nothing
    assert nothing["nmae"] == math.inf
    alone = agreement(torch.tensor([1.0]), torch.tensor([1.0]))
    assert alone["nmae"] == 0
    assert math.isnan(alone["correlation"])


def test_a_result_is_a_table_and_can_be_saved(model, tmp_path):
    found = check(model)
    back = lf.load_result(found.save(tmp_path / "deletions.safetensors"))
    pd.testing.assert_frame_equal(back.to_frame(), found.to_frame())
    assert back.certificate == found.certificate
    summary = found.summary()
    assert summary["n"].sum() == len(found.to_frame())
    assert summary["chosen"].tolist()[:2] == ["top", "random"]
    top = found.top(3)
    assert top["missed"].abs().is_monotonic_decreasing
    assert len(top) == 3
    assert set(found.summary(["head", "k"])["k"]) == {1, 2, 4}
    with pytest.raises(DataError, match="no column 'layer'"):
        found.summary(["layer"])


def test_the_figure_shows_the_numbers(model):
    found = check(model)
    figure = lf.plots.deletions(found, points=5)
    titles = [panel.text for panel in figure.layout.annotations]
    summary = found.summary(["kind"])
    for title, row in zip(titles, summary.to_dict("records"), strict=True):
        assert title.startswith(f"{row['kind']}<br>r = {row['correlation']:.3f}, slope")
    assert "NOT exact" in figure.layout.title.subtitle.text.replace("<br>", " ")
    assert figure.layout.xaxis3.title.text == "predicted change (attention weight)"
    points = [line for line in figure.data if line.mode == "markers"]
    assert [len(line.x) for line in points] == [5] * 8
    frame = found.to_frame()
    assert set(points[0].x) <= set(frame[frame["kind"] == KINDS[0]]["predicted"])


# Refusals


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompts": [[1, 2, 3], [4, 5]]}, "fewer than three"),
        ({"heads": ["2_mlp_out"]}, "is no head"),
        ({"heads": ["L1H1@2"]}, "is no head"),
        ({"heads": ["L7H1"]}, "there is no L7H1"),
        ({"foils": 3}, "without answers"),
        ({"answers": [[3, 4]] * 3}, "several answers"),
        ({"answers": 3, "foils": 3}, "answer and foil"),
        ({"k": 0}, "at least one k"),
        ({"k": ()}, "at least one k"),
        ({"draws": -1}, "draws=-1"),
        ({"batch": 0}, "batch=0"),
        ({"by": "nothing"}, "is no level"),
    ],
)
def test_what_cannot_be_checked_is_refused(more, said):
    model = live_model("gpt2", torch.float32)
    with pytest.raises(DataError, match=said):
        check(model, **more)
