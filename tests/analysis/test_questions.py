"""What a caller can ask, and get wrong."""

from unittest import mock

import numpy as np
import pytest
import torch
from support.loaded import folded_model
from transformer_lens import HookedTransformer
from transformer_lens.utilities import get_act_name

import lnfree_interp as lf
from lnfree_interp.analysis import scores as scores_module
from lnfree_interp.analysis.components import Component
from lnfree_interp.errors import DataError


@pytest.fixture
def dtype():
    return torch.float64


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "label",
    ["embed", "pos_embed", "L2", "L2H5", "L2N310", "2_attn_out", "2_mlp_out", "2_b_O", "2_b_out",
     "L2H5@3", "embed@0", "L2H5.b_V", "2_ln1.b", "ln_final.b", "b_U"],
)  # fmt: skip
def test_labels_are_read_back(label):
    assert Component.parse(label).label == label


@pytest.mark.parametrize("label", ["", "L2H", "H5", "L2H5@", "L2H5@x", "2_head", "blocks.0"])
def test_other_labels_are_refused(label):
    with pytest.raises(DataError, match="no component is called"):
        Component.parse(label)


def test_prompts_of_unequal_length_are_what_they_are_alone(folded):
    prompts = ["def add(self, other", "for", "return self", "for i in range("]
    for by in ("head", "source", "neuron"):
        batch = lf.attribute_logits(folded, prompts, "r", by=by).verify()
        for i, prompt in enumerate(prompts):
            alone = lf.attribute_logits(folded, prompt, "r", by=by)
            for component, value in alone:
                close(batch.select(i)[component], value)
        assert [len(row) for row in batch.prompts] == [len(folded.to_tokens(p)[0]) for p in prompts]


def test_several_answers_at_once(folded):
    several = lf.attribute_logits(folded, "return", ["r", "s", "e"], "i").verify()
    assert several.values.shape[1:] == (3,)
    for i, answer in enumerate(["r", "s", "e"]):
        close(several.values[:, i], lf.attribute_logits(folded, "return", answer, "i").values)
    batch = lf.attribute_logits(folded, ["return", "for i"], [["r", "s"], ["e", "i"]]).verify()
    close(batch.values[:, 1, 0], lf.attribute_logits(folded, "for i", "e").values)
    sources = lf.attribute_logits(folded, "return", ["r", "s"], by="source").verify()
    close(sources.values[:, 1], lf.attribute_logits(folded, "return", "s", by="source").values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_taken_off_where_a_mask_says_so(folded, side):
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10, 11, 12])]
    tokens, mask = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(5 - len(row), 5) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, 1
    padded = lf.attribute_logits(lf.trace(folded, tokens, attention_mask=mask), 3)
    for i, row in enumerate(rows):
        close(padded.values[:, i], lf.attribute_logits(folded, row, 3).values)
    close(padded.values, lf.attribute_logits(folded, rows, 3).values)
    mask[1, 2] = 0
    with pytest.raises(DataError, match="hole"):
        lf.attribute_logits(lf.trace(folded, tokens, attention_mask=mask), 3)


def test_padding_without_a_mask_is_refused(folded):
    folded.tokenizer.pad_token = folded.tokenizer.convert_ids_to_tokens(250)
    with pytest.raises(DataError, match="pass attention_mask"):
        lf.attribute_logits(folded, torch.tensor([[250, 5, 6], [7, 8, 9]]), 3)
    with pytest.raises(DataError, match="pass attention_mask"):
        lf.decompose_residual(folded, torch.tensor([[5, 6, 250], [7, 8, 9]]))


def test_wrong_questions_are_refused(folded):
    tokens = torch.arange(6)
    for question, message in (
        (lambda: lf.attribute_logits(folded, torch.tensor([5, 400]), 3), "0 to 299"),
        (lambda: lf.attribute_logits(folded, torch.ones(2, 2, 2).long(), 3), "pos"),
        (lambda: lf.attribute_logits(folded, [1.5, 2.0], 3), "whole numbers"),
        (lambda: lf.attribute_logits(folded, torch.tensor([True, False]), 3), "whole numbers"),
        (lambda: lf.attribute_logits(folded, [], 3), "empty"),
        (lambda: lf.attribute_logits(folded, [tokens[None], tokens[None]], 3), r"is \[pos\]"),
        (lambda: lf.attribute_logits(folded, tokens, [3.0]), "a string or a whole number"),
        (lambda: lf.attribute_logits(folded, tokens, 3).top(0), "at least 1"),
        (lambda: lf.attribute_logits(folded, tokens, 3).select(0), "already"),
        (lambda: lf.attribute_logits(folded, tokens[None], 3).select(1), "no prompt 1 among 1"),
        (lambda: lf.attribute_next_tokens(folded, tokens[None, :1]), "no next token"),
        (lambda: lf.certify(folded, tokens[:1]), "at least two"),
        (lambda: lf.direct_effects(folded, tokens[None], batch=0), "at least one sequence"),
        (lambda: lf.trace(folded, "", prepend_bos=False), "empty"),
        (lambda: lf.attribute_logits(folded, "return", ["zzz qqq", "r"]), "is one token"),
        (lambda: lf.attribute_logits(folded, ["a", "b"], [["r", "s"], ["e"]]), "same number"),
        (lambda: lf.attribute_logits(folded, ["a", "b"], ["r", ["e", "s"]]), "or every prompt"),
        (lambda: lf.attribute_logits(folded, "a", ["r", "s"], ["e", "i", "n"]), "2 answers, but 3"),
        (lambda: lf.attribute_logits(folded, "a", "r")["L9H9"], "no component 'L9H9'"),
        (lambda: lf.attribute_logits(folded, "a", "r")["L1H33"], "did you mean L1H3"),
        (lambda: lf.decompose_residual(folded, tokens, "blocks.9.hook_resid_pre"), "no place"),
        (lambda: lf.decompose_residual(folded, tokens, pos=6), "no position 6 among 6"),
        (lambda: lf.decompose_residual(folded, ["a b", "a"], pos=slice(2)), "differ in length"),
        (lambda: lf.decompose_residual(folded, tokens, onto=torch.ones(3)), "has 32 entries"),
        (lambda: lf.attribute_scores(folded, tokens, 0, 7), "no L0H7"),
        (lambda: lf.attribute_scores(folded, tokens, 0, 0, query=2, keys=[4]), "sees keys 0 to 2"),
        (lambda: lf.attribute_scores(folded, tokens, 2, 0).log_odds(0, 9), "no position 9"),
        (lambda: lf.counterfactual_pattern(folded, tokens, 1, 0, "L2H0"), "no component 'L2H0'"),
        (lambda: lf.counterfactual_pattern(folded, tokens, 1, 0, "b_Q"), "no part of the stream"),
        (lambda: lf.counterfactual_pattern(folded, tokens, 1, 0, []), "at least one component"),
        (lambda: lf.counterfactual_pattern(folded, tokens, 1, 0, ["L0H0"] * 2), "named twice"),
        (lambda: lf.direct_effect_additivity(folded, tokens[None], "L0H0", "L0H0"), "both groups"),
        (lambda: lf.attribute_scores(folded, tokens, 1, 0, keys=[9]), "no position 9"),
        (lambda: lf.attribute_scores(folded, tokens, True, 0), "a whole number, not True"),
        (lambda: lf.attribute_scores(folded, tokens, 1, 0).top(0, k=-1), "at least 1"),
        (lambda: lf.decompose_residual(folded, tokens, pos=slice(None, None, -1)), "backwards"),
        (lambda: lf.virtual_weights(folded, "L0H0@3", "L1H0", "Q"), "same at every position"),
        (lambda: lf.bigram_table(folded).top(0), "at least 1"),
        (lambda: lf.attribute_neuron(folded, tokens, 0, 999), "neurons 0 to 127"),
        (lambda: lf.attribute_neuron(folded, tokens, 5, 0), "no MLP in layer 5"),
        (lambda: lf.flip_distances(folded, tokens, 1, "L7H0"), "no component 'L7H0'"),
        (lambda: lf.affine_map(folded, "a", ["r", "s"]), "one at a time"),
        (lambda: lf.expand_paths(folded, tokens, 3, top_k=0), "at least 1"),
        (lambda: lf.flow_graph(folded, tokens, 3).node("L9H9@1"), "no node"),
        (lambda: lf.mean_next_token_attribution(folded, tokens[None], by="source"), "by='head'"),
        (lambda: lf.mean_next_token_attribution(folded, []), "no text"),
    ):
        with pytest.raises(DataError, match=message):
            question()


def test_a_run_that_is_there_already_is_used(folded, tokens):
    run = folded.run_with_cache(tokens)
    again = lf.attribute_next_tokens(lf.trace(folded, tokens, run=run), by="neuron").verify()
    close(again.values, lf.attribute_next_tokens(folded, tokens, by="neuron").values)
    logits, cache = folded.run_with_cache(tokens, names_filter=get_act_name("z", 0))
    with pytest.raises(DataError, match="lacks hook_embed"):
        lf.trace(folded, tokens, run=(logits, cache))


def test_the_mean_over_much_text_is_the_mean(folded):
    tokens = torch.randint(300, (11, 9), generator=torch.Generator().manual_seed(2))
    whole = lf.attribute_next_tokens(folded, tokens).values.flatten(1)
    mean = lf.mean_next_token_attribution(folded, tokens, batch=4)
    close(mean.mean, whole.mean(1))
    close(mean.mean_abs, whole.abs().mean(1))
    close(mean.std, whole.std(1, correction=0))
    assert mean.count == whole.shape[1]
    mean.as_contributions().verify()
    close(lf.mean_next_token_attribution(folded, tokens.split(3)).mean, mean.mean)


def test_the_spread_of_values_that_are_large_in_half_precision():
    """Their squares are above what the dtype holds."""
    model = folded_model("gpt2", torch.float32)
    with torch.no_grad():
        model.W_U[:] *= 600.0 / model(torch.arange(9)[None]).abs().max()
    tokens = torch.randint(300, (4, 9), generator=torch.Generator().manual_seed(2))
    exact = lf.mean_next_token_attribution(model, tokens)
    half = lf.mean_next_token_attribution(model.to(torch.float16), tokens)
    assert exact.std.max() > 100
    torch.testing.assert_close(half.std, exact.std, rtol=0.02, atol=0.2)


def test_scores_and_their_sums(folded):
    tokens = torch.arange(8)
    scores = lf.attribute_scores(folded, tokens, 2, 1, query=5).verify()
    model_scores = folded.run_with_cache(tokens[None])[1][get_act_name("attn_scores", 2)][0, 1, 5]
    close(scores.total, model_scores[:6])
    close(scores.by_query().verify().values, scores.values.sum(1))
    close(scores.by_key().verify().values, scores.values.sum(0))
    odds = scores.log_odds(3, 0).verify()
    pattern = folded.run_with_cache(tokens[None])[1][get_act_name("pattern", 2)][0, 1, 5]
    close(odds.total, (pattern[3] / pattern[0]).log())
    top = scores.top(3, k=4)
    assert top["value"].abs().is_monotonic_decreasing
    few = lf.attribute_scores(folded, tokens, 2, 1, query=5, keys=[4, 2], by="neuron").verify()
    close(few.total, model_scores[[4, 2]])


@pytest.mark.parametrize("side", ["both", "query", "key"])
@pytest.mark.parametrize(
    "without", ["L0H1", ["embed", "1_mlp_out"], "pos_embed", "L1H2@3", "L1N7", "0_b_O", "L0H1.b_V"]
)
def test_counterfactual_patterns_are_those_of_a_patched_run(folded, side, without):
    by = "source" if "@" in without or "b_V" in without else "neuron" if "N" in without else "head"
    found = lf.counterfactual_pattern(folded, torch.arange(8), 2, 1, without, side=side, by=by)
    found.verify(1e-10)
    close(found.pattern.sum(-1), torch.ones(8, dtype=torch.float64))
    if side != "key" or "b_" not in without:  # the same at every key: the softmax does not see it
        assert not torch.allclose(found.pattern, found.original)
    assert not found.pattern.triu(1).any()


def test_padding_by_end_of_text_is_found(folded):
    """GPT-2's tokenizer has no padding token, so TransformerLens pads with end-of-text."""
    texts = ["for i", "def add(self, other): return xyz xyz xyz"]
    padded = folded.to_tokens(texts)
    assert padded[0, -1] == folded.tokenizer.eos_token_id
    with pytest.raises(DataError, match="pass attention_mask"):
        lf.attribute_logits(folded, padded, 7)
    with pytest.raises(DataError, match="pass attention_mask"):
        lf.attribute_next_tokens(folded, padded)
    whole = folded.to_tokens(texts[1])
    ends = torch.cat([whole[:, :-1], padded[:1, -1:]], dim=1)  # text that ends in end-of-text
    lf.attribute_next_tokens(folded, torch.cat([whole, ends])).verify()


@pytest.mark.parametrize("prepends", [True, False])
def test_a_tokenizer_that_pads_on_the_left_masks_nothing(folded, prepends):
    text = "for i in range"
    expected = lf.attribute_logits(lf.trace(folded, text, prepend_bos=True), 7)
    folded.tokenizer.padding_side = "left"
    folded.cfg.default_prepend_bos = prepends
    trace = lf.trace(folded, text, prepend_bos=True)
    found = lf.attribute_logits(trace, 7).verify()
    close(found.values, expected.values)
    assert lf.attribute_scores(trace, 1, 0).keys[0] == 0
    assert len(lf.attribute_logits(folded, text, 7).prompts[0]) == len(found.prompts[0]) - (
        not prepends
    )
    bos = folded.tokenizer.bos_token_id
    tokens = torch.tensor([bos, bos, 5, 6, 7])
    text = lf.trace(folded, tokens, attention_mask=torch.ones_like(tokens))
    assert all(c.holds for c in lf.certify(text))


def test_token_ids_in_any_container(folded):
    expected = lf.attribute_logits(folded, torch.tensor([5, 6, 7]), 3).values
    for prompt in ([5, 6, 7], np.array([5, 6, 7]), torch.tensor([5, 6, 7], dtype=torch.uint8)):
        for answer in (3, torch.tensor(3), np.int64(3)):
            close(lf.attribute_logits(folded, prompt, answer).values, expected)
    several = lf.attribute_logits(folded, [[5, 6, 7], [5, 6]], torch.tensor([3, 4]))
    close(several.values[:, 0], expected)
    assert lf.attribute_logits(folded, [[5, 6], [7, 8]], [3, 4]).values.shape[1] == 2


def test_a_run_of_other_tokens_is_refused(folded):
    a, b = torch.randint(300, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="other tokens"):
        lf.trace(folded, a, run=folded.run_with_cache(b))


def test_a_mask_is_ones_and_zeros(folded):
    with pytest.raises(DataError, match="1 where there is text"):
        lf.trace(folded, torch.arange(3), attention_mask=torch.tensor([-1e9, 0.0, 0.0]))


def test_selecting_keeps_names(folded):
    rows = torch.stack([torch.arange(6), torch.arange(7, 13)])
    batch = lf.attribute_logits(folded, rows, [[3, 4], [5, 6]])
    last = batch.select(-1)
    assert last.of == batch.of[1:]
    assert last.prompts == batch.prompts[1:]
    answers = last.select(1)
    assert answers.values.ndim == 1
    close(answers.values, batch.values[:, 1, 1])
    assert answers.of == (batch.answers[1][1],)
    assert answers.top(2)["component"].tolist()


def test_any_query_of_a_model_that_looks_ahead(folded):
    cfg = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "d_mlp": 40, "n_ctx": 24}
    cfg |= {"d_vocab": 50, "act_fn": "gelu", "normalization_type": None, "seed": 0}
    model = HookedTransformer(cfg | {"attention_dir": "bidirectional"})
    lf.attribute_scores(model, torch.arange(6), 1, 0, query=2).verify()


def test_scores_of_few_keys_take_little_memory(folded):
    tokens = torch.randint(300, (40,), generator=torch.Generator().manual_seed(0))
    whole = lf.attribute_scores(folded, tokens, 2, 1, by="head").verify()
    for keys in ([5], [30, 3, 4, 5, 39], 7):
        few = lf.attribute_scores(folded, tokens, 2, 1, keys=keys, by="head").verify()
        close(few.values, whole.values[:, :, list(few.keys)])
    sizes = []
    original = scores_module.transform

    def watch(parts, W):
        values, components = original(parts, W)
        sizes.append(values.shape[2])
        return values, components

    with mock.patch.object(scores_module, "transform", watch):
        lf.attribute_scores(folded, tokens, 2, 1, keys=[5], by="neuron").verify()
    assert sizes == [1, 1]


def test_no_logit_under_a_cap_is_no_problem():
    cfg = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 20, "n_ctx": 24}
    cfg |= {"d_vocab": 50, "act_fn": "gelu", "normalization_type": None, "seed": 0}
    model = HookedTransformer(cfg | {"output_logits_soft_cap": 3.0, "attn_scores_soft_cap": 2.0})
    with torch.no_grad():
        model.W_U[:, 7] = 0
        model.b_U[7] = 0
        model.blocks[0].attn.W_Q[0] = 0
    held = lf.trace(model, torch.arange(6), hold=True)
    for result in (lf.attribute_logits(held, 3, 7), lf.attribute_scores(held, 0, 0)):
        result.certificate.require()
        assert result.values.isfinite().all()


def test_means_are_judged_by_what_the_model_computed_in(folded):
    tokens = torch.randint(300, (5, 9), generator=torch.Generator().manual_seed(2))
    mean = lf.mean_next_token_attribution(folded, tokens).verify()
    assert mean.as_contributions().error.dtype == folded.cfg.dtype
    top = mean.top(3)
    assert top["value"].iloc[0] == pytest.approx(mean[top["component"].iloc[0]])
    assert set(top) >= {"mean_abs", "std"}


def test_paths_are_written_as_they_are_read(folded):
    for label in ("embed@3 > L0H1 > L2H5", "L0H1@3", "0_mlp_out@2 > L1H0", "L1.feature17"):
        assert lf.Component.parse(label).label == label


def test_results_say_what_they_are_in_a_line(folded):
    tokens = torch.arange(6)
    for result in (
        lf.attribute_logits(folded, tokens, 3),
        lf.attribute_scores(folded, tokens, 1, 0),
        lf.counterfactual_pattern(folded, tokens, 1, 0, "L0H0"),
        lf.affine_map(folded, tokens, 3).verify(),
        lf.flow_graph(folded, tokens, 3),
        lf.logit_lens(folded, tokens[None]),
        lf.flip_distances(folded, tokens, 1, "L0H0"),
        lf.mean_next_token_attribution(folded, tokens[None]),
        lf.ov_table(folded, 1, 0),
    ):
        assert len(repr(result)) < 300
        assert type(result).__name__ in repr(result)
