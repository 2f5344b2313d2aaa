"""A linear prediction is the exact sum over heads, neurons and source tokens."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from support.loaded import folded_model, frozen_model, live_model
from support.mutations import mutated
from support.probing import SITE, sentences

import lnfree_interp as lf
from lnfree_interp.errors import DataError, HeldWarning, InexactError
from lnfree_interp.probing import fitted as fitted_module

KINDS = ["gpt2", "neox", "llama-grouped", "qwen3", "gemma2-no-caps", "mistral"]
LEVELS = ["layer", "sublayer", "head", "neuron", "source"]
NAME = "planted_GPT"


def fit(model, pool="mean", site=SITE, **more):
    data = lf.planted_reading_times(model, site, words=sentences(40), pool=pool, noise=0.2)
    return lf.fit_probe(
        model, site, data.targets, words=data.words, pool=pool, progress=False, **more
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", ["first", "mean", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_add_up_to_the_prediction(kind, pool):
    model = folded_model(kind, tokenizer=True)
    fitted, sentence = fit(model, pool), lf.Sentence(["print", "a", "self,", "猫"])
    _, cache = model.run_with_cache(model.to_tokens(sentence.text))
    direction, constant = fitted.direction(NAME)
    said = fitted.predict([sentence], "stream")[NAME]
    trace = lf.trace(model, sentence.text)
    tokens = lf.word_tokens(model, sentence)
    assert max(len(at) for at in tokens.positions) > 2
    for word, at in enumerate(tokens.positions):
        rows = {"first": [at[0]], "mean": list(at), "last": [at[-1]]}[pool]
        by_hand = (cache[SITE][0, rows] @ direction).mean() + constant
        target = fitted.target(NAME, sentence, word)
        for by in LEVELS:
            found = trace.attribute(target, by=by).verify(1e-10)
            close(found.total, by_hand.detach())
            close(found.values.sum(), torch.tensor(said[word], dtype=torch.float64))
            close(found["probe.b"], torch.tensor(constant, dtype=torch.float64))
            assert found.unit == NAME
            assert found.of == (f"{NAME} of {sentence.words[word]!r}",)
        sublayers = trace.attribute(target, by="sublayer")
        part = (cache["attn_out", 1][0, rows] @ direction).mean()
        close(sublayers["1_attn_out"], part.detach())
    assert trace.runs == 1


def test_source_tokens_and_paths_of_the_mean_over_a_word():
    model = folded_model("gpt2", tokenizer=True)
    fitted, sentence = fit(model), lf.Sentence(["self,", "print"])
    trace, target = lf.trace(model, sentence.text), fitted.target(NAME, sentence, -1)
    whole = trace.attribute(target, by="head").verify(1e-10)
    for result in (
        lf.affine_map(trace, target).verify(1e-10).contributions,
        lf.expand_paths(trace, target, top_k=None, expansions=20).verify(1e-10),
        lf.flow_graph(trace, target, top_k=None).verify(1e-10),
    ):
        close(result.total, whole.total)
        assert result.unit == NAME
    effects = lf.ablate(trace, ["L1H1", "0_mlp_out"]).compare(target).verify(1e-10)
    close(effects.predicted[0, 0], whole["L1H1"])
    source = trace.attribute(target, by="source")
    head = sum(value for one, value in source if (one.kind, one.layer, one.index) == ("head", 1, 1))
    with_bias = trace.attribute(target, by="head", biases=True)
    close(head, with_bias["L1H1"])


@pytest.mark.parametrize(
    "name", ["drop b_O", "drop b_V", "transposed W_O", "wrong scale", "wrong positions"]
)
def test_mutations_of_the_parts_are_noticed(name):
    model = folded_model("gpt2", tokenizer=True)
    fitted = fit(model)
    sentence = fitted.sentences[0]
    target = fitted.target(NAME, sentence, 1)
    lf.attribute(model, sentence.text, target).verify(1e-10)
    with mutated(name):
        found = lf.attribute(model, sentence.text, target, by="head")
        assert found.error.relative > 1e-6


def without_mean(pipeline, right):
    directions, _ = right(pipeline)
    return directions, pipeline[-1].intercept_


def without_scale(pipeline, right):
    directions = pipeline[-1].coef_
    return directions, pipeline[-1].intercept_ - directions @ pipeline[0].mean_


def without_intercept(pipeline, right):
    directions, constants = right(pipeline)
    return directions, constants - pipeline[-1].intercept_


def shifted(target):
    at = target.probe.pos
    return replace(target, probe=replace(target.probe, pos=slice(at.start - 1, at.stop)))


@pytest.mark.parametrize("mutation", [without_mean, without_scale, without_intercept])
def test_mutations_of_the_folding_are_noticed(mutation):
    model = folded_model("gpt2", tokenizer=True)
    fitted = fit(model)
    sentence, right = fitted.sentences[0], fitted_module.folded
    lf.attribute(model, sentence.text, fitted.target(NAME, sentence, 1)).verify(1e-10)
    with mock.patch.object(fitted_module, "folded", lambda one: mutation(one, right)):
        target = fitted.target(NAME, sentence, 1)
    with pytest.raises(InexactError, match=f"the prediction of {NAME}"):
        lf.attribute(model, sentence.text, target).verify()


def test_a_word_read_elsewhere_than_it_was_fitted_is_noticed():
    model = folded_model("gpt2", tokenizer=True)
    fitted = fit(model)
    sentence = fitted.sentences[0]
    target = shifted(fitted.target(NAME, sentence, 1))
    with pytest.raises(InexactError):
        lf.attribute(model, sentence.text, target).verify()


def test_a_probe_of_the_stream_reads_through_no_norm():
    live = live_model("gpt2", tokenizer=True)
    fitted = fit(live)
    sentence = fitted.sentences[0]
    target = fitted.target(NAME, sentence, 2)
    for by in LEVELS:
        found = lf.attribute(live, sentence.text, target, by=by).verify(1e-10)
        assert found.held == ()
    assert lf.norms_read(live, sentence.text, target) == ()
    with pytest.raises(InexactError, match=r"ln1.v in blocks 0 to 1 and ln2 in blocks 0 to 1"):
        lf.affine_map(live, sentence.text, target)


@pytest.mark.parametrize("site", ["ln_final", "blocks.1.ln2", "blocks.2.ln1.qk"])
def test_a_live_norm_before_the_probe_is_refused_by_name_held_or_frozen(site):
    live = live_model("gpt2", tokenizer=True)
    fitted = fit(live, site=site)
    sentence = fitted.sentences[0]
    target = fitted.target(NAME, sentence, 2)
    with pytest.raises(InexactError, match=f"^{site} is not affine"):
        lf.attribute(live, sentence.text, target)
    assert [str(one) for one in lf.norms_read(live, sentence.text, target)] == [site]
    held = lf.attribute(lf.trace(live, sentence.text, hold=True), target)
    with pytest.warns(HeldWarning, match=site):
        held.verify(1e-10)
    assert held.gap.relative > 1e-3
    frozen = frozen_model("gpt2", tokenizer=True)
    for model in (frozen, lf.frozen_form(frozen)) if site == "ln_final" else (frozen,):
        again = fit(model, site=site)
        target = again.target(NAME, sentence, 2)
        for by in LEVELS:
            found = lf.attribute(model, sentence.text, target, by=by).verify(1e-10)
            close(found.total.item(), again.predict([sentence], "stream")[NAME][2])
            assert found.held == ()
        if model is frozen:
            bias = {"ln_final": "ln_final.b", "blocks.1.ln2": "1_ln2.b"}.get(site, "2_ln1.b")
            assert bias in found.labels


def test_the_price_of_an_exact_probe_behind_a_norm():
    live = live_model("gpt2", tokenizer=True)
    fitted = fit(live, site="ln_final")
    target = fitted.target(NAME, fitted.sentences[0], 2)
    text = torch.randint(300, (16, 32), generator=torch.Generator().manual_seed(0))
    made = lf.freeze_for(live, target, text, progress=False)
    assert [str(site) for site in lf.live_sites(made.model)].count("ln_final") == 0
    sentence = fitted.sentences[0]
    lf.attribute(made.model, sentence.text, target).verify(1e-10)


def test_what_is_no_target_is_refused():
    model = folded_model("gpt2", tokenizer=True)
    fitted = fit(model)
    one, other = fitted.sentences[:2]
    target = fitted.target(NAME, one, 1)
    with pytest.raises(DataError, match="of another prompt"):
        lf.attribute(model, other.text, target)
    with pytest.raises(DataError, match="of another prompt"):
        lf.attribute(model, [one.text, one.text], target)
    with pytest.raises(DataError, match="no target 'GPT': there are planted_nFix"):
        fitted.target("GPT", one, 1)
    with pytest.raises(DataError, match="no word 4 among 4"):
        fitted.target(NAME, one, 4)
    mlp = fit(model, head="mlp")
    with pytest.raises(DataError, match="an mlp is not linear in the stream"):
        mlp.target(NAME, one, 1)
    assert mlp.predict([one]).shape == (4, 8)


def test_float32_within_what_rounding_explains():
    model = folded_model("llama-grouped", torch.float32, tokenizer=True)
    fitted = fit(model)
    for sentence in fitted.sentences[:3]:
        for by in LEVELS:
            lf.attribute(model, sentence.text, fitted.target(NAME, sentence, 2), by=by).verify()
