"""What a caller can ask, and get wrong."""

import pytest
import torch
from transformer_lens.utilities import get_act_name

import lnfree_interp as lf
from lnfree_interp.analysis.contributions import Component
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
    padded = lf.attribute_logits(folded, tokens, 3, attention_mask=mask)
    for i, row in enumerate(rows):
        close(padded.values[:, i], lf.attribute_logits(folded, row, 3).values)
    close(padded.values, lf.attribute_logits(folded, rows, 3).values)
    mask[1, 2] = 0
    with pytest.raises(DataError, match="hole"):
        lf.attribute_logits(folded, tokens, 3, attention_mask=mask)


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
        (lambda: lf.attribute_logits(folded, torch.ones(2, 2, 2).long(), 3), "whole numbers"),
        (lambda: lf.attribute_logits(folded, "", 3, prepend_bos=False), "empty"),
        (lambda: lf.attribute_logits(folded, "return", ["zzz qqq", "r"]), "is one token"),
        (lambda: lf.attribute_logits(folded, ["a", "b"], [["r", "s"], ["e"]]), "same number"),
        (lambda: lf.attribute_logits(folded, ["a", "b"], ["r", ["e", "s"]]), "or every prompt"),
        (lambda: lf.attribute_logits(folded, "a", ["r", "s"], ["e", "i", "n"]), "2 answers, but 3"),
        (lambda: lf.attribute_logits(folded, "a", "r")["L9H9"], "no component 'L9H9'"),
        (lambda: lf.attribute_logits(folded, "a", "r")["L1H33"], "did you mean L1H3"),
        (lambda: lf.decompose_residual(folded, tokens, "blocks.9.hook_resid_pre"), "no place"),
        (lambda: lf.decompose_residual(folded, tokens, pos=6), "no position 6 among 6"),
        (lambda: lf.decompose_residual(folded, ["a b", "a"]), "differ in length"),
        (lambda: lf.decompose_residual(folded, tokens, onto=torch.ones(3)), "has 32 entries"),
        (lambda: lf.attribute_scores(folded, tokens, 0, 7), "no L0H7"),
        (lambda: lf.attribute_scores(folded, tokens, 0, 0, query=2, keys=[4]), "sees keys 0 to 2"),
        (lambda: lf.attribute_scores(folded, ["a", "b"], 0, 0), "one prompt at a time"),
        (lambda: lf.attribute_scores(folded, tokens, 2, 0).log_odds(0, 9), "not among the keys"),
        (lambda: lf.counterfactual_pattern(folded, tokens, 1, 0, "L2H0"), "no component 'L2H0'"),
        (lambda: lf.counterfactual_pattern(folded, tokens, 1, 0, "b_Q"), "no part of the stream"),
        (lambda: lf.attribute_neuron(folded, tokens, 0, 999), "neurons 0 to 127"),
        (lambda: lf.attribute_neuron(folded, tokens, 5, 0), "no MLP in layer 5"),
        (lambda: lf.flip_distances(folded, tokens, 1, "L7H0"), "no component 'L7H0'"),
        (lambda: lf.affine_map(folded, ["a", "b"], "r"), "one prompt at a time"),
        (lambda: lf.expand_paths(folded, tokens, 3, top_k=0), "at least one path"),
        (lambda: lf.flow_graph(folded, tokens, 3).node("L9H9@1"), "no node"),
        (lambda: lf.mean_next_token_attribution(folded, tokens[None], by="source"), "by='head'"),
        (lambda: lf.mean_next_token_attribution(folded, []), "no text"),
    ):
        with pytest.raises(DataError, match=message):
            question()


def test_a_run_that_is_there_already_is_used(folded, tokens):
    run = folded.run_with_cache(tokens)
    again = lf.attribute_next_tokens(folded, tokens, by="neuron", run=run).verify()
    close(again.values, lf.attribute_next_tokens(folded, tokens, by="neuron").values)
    logits, cache = folded.run_with_cache(tokens, names_filter=get_act_name("z", 0))
    with pytest.raises(DataError, match="lacks hook_embed"):
        lf.attribute_next_tokens(folded, tokens, run=(logits, cache))


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
