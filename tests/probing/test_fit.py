"""Planted targets are found, shuffled ones are not, and errors are what their names say."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LinearRegression
from support.loaded import folded_model, live_model
from support.probing import SITE, sentences

import lnfree_interp as lf
from lnfree_interp.errors import DataError
from lnfree_interp.probing.fit import held_out_in
from lnfree_interp.probing.heads import folded, make_head, predict

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def model():
    return folded_model("gpt2", tokenizer=True)


@pytest.fixture(scope="module")
def data(model):
    return lf.planted_reading_times(model, SITE, words=sentences(80), pool="mean")


@pytest.fixture(scope="module")
def fitted(model, data):
    more = {"words": data.words, "pool": "mean", "ridge": 1e-10}
    return lf.fit_probe(model, SITE, data.targets, **more, **QUIET)


def test_a_planted_linear_target_is_found_on_held_out_sentences(fitted):
    r2 = fitted.r2
    assert (r2["stream"] >= 1 - 1e-6).all()
    assert (r2["words"] < 0.5).all()  # it was not planted in these
    assert fitted.mae["stream"].max() < 1e-6


def test_less_ridge_is_closer(model, data):
    found = [
        lf.fit_probe(
            model, SITE, data.targets, words=data.words, pool="mean", ridge=ridge, **QUIET
        ).r2["stream"].min()
        for ridge in (1000.0, 10.0, 0.1, 0.0)
    ]  # fmt: skip
    assert found == sorted(found)
    assert found[0] < 0.9
    assert found[-1] >= 1 - 1e-6


@pytest.mark.parametrize("head", ["ridge", "mlp"])
def test_shuffled_targets_are_not_found(model, data, head):
    order = torch.randperm(len(data.to_frame()), generator=torch.Generator().manual_seed(1))
    shuffled = {name: column[order] for name, column in data.targets.items()}
    found = lf.fit_probe(model, SITE, shuffled, words=data.words, head=head, **QUIET)
    assert (found.r2[["stream", "words", "ensemble"]] <= 0.05).all(axis=None)


def test_the_mean_predictor_and_the_measures_by_hand(fitted, data):
    for name, y in data.targets.items():
        row = fitted.mae.loc[name]
        assert row["mean"] == pytest.approx((y - y.mean()).abs().mean().item(), rel=1e-12)
        assert fitted.r2.loc[name, "mean"] == pytest.approx(0, abs=1e-12)
        said = fitted.held_out["words"][:, fitted.names.index(name)]
        assert row["words"] == pytest.approx((said - y).abs().mean().item(), rel=1e-12)
        r2 = 1 - (said - y).square().sum() / (y - y.mean()).square().sum()
        assert fitted.r2.loc[name, "words"] == pytest.approx(r2.item(), rel=1e-12)
    frame = fitted.to_frame()
    assert frame.shape == (20, 5)
    assert frame["mae"].tolist() == fitted.mae.to_numpy().flatten().tolist()


@pytest.mark.parametrize("head", ["ridge", "mlp"])
def test_an_ensemble_is_no_worse_than_its_members_on_average(model, data, head):
    noisy = lf.planted_reading_times(model, SITE, words=data.words, noise=1.0)
    found = lf.fit_probe(model, SITE, noisy.targets, words=data.words, head=head, **QUIET)
    mae = found.mae
    assert (mae["ensemble"] <= (mae["stream"] + mae["words"]) / 2 + 1e-12).all()
    assert (mae["ensemble"] < (mae["stream"] + mae["words"]) / 2 - 1e-3).any()


def test_a_sentence_is_held_out_whole_and_so_is_the_same_sentence_elsewhere():
    one, *others = sentences(9)
    many = [lf.Sentence(words) for words in [one, *others, one, one]]
    fold = held_out_in(many, 4)
    ends = np.cumsum([len(sentence) for sentence in many])
    by_sentence = [set(x.tolist()) for x in np.split(fold, ends[:-1])]
    assert all(len(folds) == 1 for folds in by_sentence)
    assert by_sentence[0] == by_sentence[-1] == by_sentence[-2]
    assert set(fold.tolist()) == {0, 1, 2, 3}


def test_no_held_out_word_is_fitted_on(fitted, data):
    """What is said of a fold is what a regression without it says."""
    out = (fitted.fold == 2).numpy()
    X = lf.word_features(data.words).to_numpy()
    y = fitted.observed.numpy()
    head = make_head("ridge", 1e-10, 1, 0).fit(X[~out], y[~out])
    np.testing.assert_allclose(
        fitted.held_out["words"].numpy()[out], predict(head, X[out]), rtol=1e-9
    )


def test_a_folded_ridge_regression_is_the_regression():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(90, 7)) * draw.uniform(0.01, 100, 7) + 10 * draw.normal(size=7)
    X[:, 3] = 4.0  # does not vary
    y = draw.normal(size=(90, 2)) + 5
    for ridge in (3.0, (0.1, 1.0, 10.0)):
        for columns in (y, y[:, :1]):
            head = make_head("ridge", ridge, 1, 0).fit(X, columns)
            directions, constants = folded(head)
            said = X @ directions.T + constants
            np.testing.assert_allclose(said, predict(head, X), rtol=1e-10, atol=1e-10)
    exact = LinearRegression().fit(X, y)
    np.testing.assert_allclose(
        predict(make_head("ridge", 0.0, 1, 0).fit(X, y), X), exact.predict(X), rtol=1e-8
    )


def test_many_sites_from_one_pass_are_each_what_they_are_alone(model, data):
    more = {"words": data.words, "pool": "mean", "ridge": 0.1, **QUIET}
    fits = lf.fit_probes(model, data.targets, **more)
    assert list(fits) == [
        "blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(3)),
    ]  # fmt: skip
    alone = lf.fit_probe(model, SITE, data.targets, **more, batch=1)
    torch.testing.assert_close(fits[SITE].held_out["stream"], alone.held_out["stream"])
    best = max(fits, key=lambda site: fits[site].r2["stream"].mean())
    assert best == SITE


def test_predictions_of_other_sentences(model, fitted):
    other = [["self", "for"], ["add", "x", "10"]]
    said = {member: fitted.predict(other, member) for member in ("stream", "words", "ensemble")}
    assert said["stream"][["sentence_id", "word_id", "word"]].to_numpy().tolist() == [
        [0, 0, "self"], [0, 1, "for"], [1, 0, "add"], [1, 1, "x"], [1, 2, "10"],
    ]  # fmt: skip
    names = list(fitted.names)
    mean = (said["stream"][names] + said["words"][names]) / 2
    pd.testing.assert_frame_equal(said["ensemble"][names], mean)
    _, cache = model.run_with_cache(model.to_tokens("add x 10"))
    at = lf.word_tokens(model, other[1]).positions[2]
    direction, constant = fitted.direction(names[1])
    by_hand = cache[SITE][0, list(at)].mean(0) @ direction + constant
    assert said["stream"][names[1]].iloc[4] == pytest.approx(by_hand.item(), rel=1e-10)
    with pytest.raises(DataError, match="member='mean'"):
        fitted.predict(other, "mean")


def test_a_norm_may_stand_before_the_probe_and_live_models_are_read_too(data):
    live = live_model("gpt2", tokenizer=True)
    planted = lf.planted_reading_times(live, "ln_final", words=data.words)
    more = {"words": data.words, "ridge": 1e-10, **QUIET}
    assert (lf.fit_probe(live, "ln_final", planted.targets, **more).r2["stream"] > 1 - 1e-6).all()
    other = lf.fit_probe(live, "blocks.2.hook_resid_post", planted.targets, **more)
    assert (other.r2["stream"] < 1 - 1e-4).all()


def test_a_target_that_does_not_vary_has_no_r2(model, data):
    targets = {"same": torch.full_like(data.targets["planted_GPT"], 3.0)}
    found = lf.fit_probe(model, SITE, targets, words=data.words, **QUIET)
    assert found.r2.isna().all(axis=None)
    assert found.mae.max(axis=None) < 1e-9
    assert "same" in repr(found)


BAD = {
    "shape": ({"targets": {"a": [1.0]}}, r"target 'a' has the shape \[1\], and there are 12 words"),
    "nan": ({"targets": {"a": [float("nan")] * 12}}, "target 'a' is nan at word 0"),
    "text": ({"targets": {"a": ["x"] * 12}}, "target 'a' is not all numbers"),
    "none": ({"targets": {}}, "no targets"),
    "list": ({"targets": [1.0] * 12}, "targets are numbers by name, not a list"),
    "site": ({"site": "blocks.9.hook_resid_post"}, "'blocks.9.hook_resid_post' is no place"),
    "norm": ({"site": "blocks.9.ln2"}, "'blocks.9.ln2' is no norm that reads this model's stream"),
    "inner": ({"site": "blocks.0.attn.inner"}, "is no norm that reads"),
    "pool": ({"pool": "max"}, "pool='max'"),
    "head": ({"head": "tree"}, "head='tree'"),
    "ridge": ({"ridge": -1.0}, "ridge=-1.0"),
    "ridges": ({"ridge": (0.0, 1.0)}, "several above 0"),
    "hidden": ({"head": "mlp", "hidden": 0}, "hidden=0"),
    "mlp": ({"head": "mlp"}, "20 words at least"),
    "folds": ({"folds": 4}, "folds=4: give 2 to 3"),
    "one fold": ({"folds": 1}, "folds=1"),
    "batch": ({"batch": 0}, "batch=0"),
    "words": ({"words": []}, "no sentences"),
    "alone": ({"words": [["a"] * 12]}, "there is one sentence"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_fitted_is_refused(model, name):
    given = {"site": SITE, "targets": {"a": range(12)}, "words": sentences(3), "folds": 3} | BAD[
        name
    ][0]
    with pytest.raises(DataError, match=BAD[name][1]):
        lf.fit_probe(model, given.pop("site"), given.pop("targets"), **given, **QUIET)
    with pytest.raises(DataError, match="no sites"):
        lf.fit_probes(model, {"a": range(12)}, words=sentences(3), sites=[], **QUIET)
