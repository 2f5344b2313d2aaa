"""Every word has one row, whatever it is written in and however it is cut into tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.loaded import folded_model
from support.models import make_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

import lnfree_interp as lf
from lnfree_interp.analysis.view import view_of
from lnfree_interp.errors import DataError
from lnfree_interp.probing.sentences import as_sentences
from lnfree_interp.probing.streams import read_words

STRANGE = [
    "naïve",
    "e\u0301te\u0301",
    "👩‍👩‍👧",
    "10\u00a0km",
    "猫が好き",
    "ไทย",
    "\u200b",
    "\u00a0",
    "'s",
    "…",
]


@pytest.fixture(scope="module")
def model():
    return folded_model("gpt2", tokenizer=True, n_positions=2048)


def words_of(draw_from):
    word = st.text(draw_from, min_size=1, max_size=6) | st.sampled_from(STRANGE)
    return st.lists(word, min_size=1, max_size=6)


ANY = st.characters(exclude_categories=["Cs"])
SENTENCES = st.tuples(
    words_of(ANY) | words_of(st.sampled_from("abc, .")), st.sampled_from([" ", "", "\u00a0", "  "])
)


def by_bytes(model, sentence):
    """The positions of each word, by counting the bytes that each token stands for."""
    ids = model.tokenizer("<|endoftext|>" + sentence.text)["input_ids"]
    lengths = [len(token) for token in model.tokenizer.convert_ids_to_tokens(ids)]
    ends = np.cumsum(lengths) - lengths[0]
    found, at = [], 0
    for word in sentence.words:
        start = sentence.text.index(word, at)
        at = start + len(word)
        first, last = (len(sentence.text[:i].encode()) for i in (start, at))
        own = [i for i in range(1, len(ids)) if ends[i - 1] < last and ends[i] > first]
        found.append(range(own[0], own[-1] + 1))
    return tuple(ids), tuple(found)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example([(STRANGE, " "), (STRANGE, "")])
@given(st.lists(SENTENCES, min_size=20, max_size=20))  # 1,000 sentences
def test_every_word_has_exactly_one_row(model, drawn):
    sentences = [lf.Sentence(words, between.join(words)) for words, between in drawn]
    view, aligned = view_of(model), [lf.word_tokens(model, one) for one in sentences]
    for one in aligned:
        ids, expected = by_bytes(model, one.sentence)
        assert one.tokens == ids
        assert one.positions == expected
        assert one.missing == ()
    with tqdm(disable=True) as bar:
        rows = read_words(view, aligned, ["blocks.0.hook_resid_pre"], "mean", 7, bar)
    (stream,) = rows.values()
    n = sum(len(one.words) for one in sentences)
    assert stream.shape == (n, 32)
    assert len(lf.word_features(sentences)) == n
    embed = model.W_E + 0
    expected = torch.stack(
        [
            torch.stack([embed[one.tokens[i]] + model.W_pos[i] for i in at]).mean(0)
            for one in aligned
            for at in one.positions
        ]
    )
    torch.testing.assert_close(stream, expected.detach(), rtol=1e-10, atol=1e-10)


def test_the_tokens_are_those_that_a_trace_of_the_text_has(model):
    sentence = lf.Sentence(STRANGE)
    trace = lf.trace(model, sentence.text)
    assert lf.word_tokens(model, sentence).tokens == tuple(trace.tokens[0].tolist())
    assert trace.tokens[0, 0] == model.tokenizer.bos_token_id


def test_a_tokenizer_that_puts_the_beginning_itself(model):
    expected = lf.word_tokens(model, STRANGE)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    other = folded_model("gpt2", tokenizer=True, n_positions=2048)
    other.tokenizer, other.cfg.tokenizer_prepends_bos = tokenizer, True
    assert lf.word_tokens(other, STRANGE) == expected
    other.cfg.default_prepend_bos = False  # the tokenizer's is taken off again
    bare = lf.word_tokens(other, STRANGE)
    assert bare.tokens == expected.tokens[1:]
    assert bare.positions == tuple(range(at.start - 1, at.stop - 1) for at in expected.positions)
    assert bare.tokens == tuple(lf.trace(other, " ".join(STRANGE)).tokens[0].tolist())


def whole_words(vocabulary):
    """A tokenizer of whole words that drops what is no letter, and joins `a b` to one token."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="?"))
    backend.normalizer = normalizers.Replace("~", "")
    backend.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="?")


def test_words_that_share_a_token_and_words_without_one():
    model = folded_model("gpt2", tokenizer=True)
    model.tokenizer = whole_words(["<s>", "?", "a b", "c"])
    found = lf.word_tokens(model, lf.Sentence(["a", "b", "~", "c", "~"], "a b|~|c|~"))
    assert found.tokens == (0, 2, 3)
    assert found.positions == (range(1, 2), range(1, 2), range(1, 2), range(2, 3), range(2, 3))
    assert found.missing == (2, 4)
    model.cfg.default_prepend_bos = False
    found = lf.word_tokens(model, lf.Sentence(["~", "c"], "~|c"))
    assert (found.tokens, found.positions) == ((3,), (range(0, 1), range(0, 1)))  # none before it
    with pytest.raises(DataError, match="no token of '~'"):
        lf.word_tokens(model, ["~"])


@pytest.mark.parametrize(
    ("words", "text", "said"),
    [
        ("The cat", "", r"not the string 'The cat': give text.split\(\)"),
        ([], "", "no words"),
        (["a", ""], "", "word 1 is ''"),
        (["a", 3], "", "word 1 is 3"),
        (["a", "\ud800"], "", "word 1, .* is no Unicode text"),
        (["b", "a"], "a b", "word 1, 'a', does not follow in the text 'a b'"),
    ],
)
def test_what_is_no_sentence_is_refused(words, text, said):
    with pytest.raises(DataError, match=said):
        lf.Sentence(words, text)


def test_a_sentence_is_named_by_its_number_and_too_long_ones_by_their_text(model):
    with pytest.raises(DataError, match="sentence 1: a sentence is a list of words"):
        lf.word_features([["a"], "a b"])
    for one in (lf.Sentence(["a"]), "a b"):
        with pytest.raises(DataError, match="give a list of sentences, each a list of words"):
            as_sentences(one)
    short = folded_model("gpt2", tokenizer=True)
    with pytest.raises(DataError, match="51 tokens; the model's context is 48"):
        lf.word_tokens(short, ["q" * 50])
    short.tokenizer = SimpleNamespace(is_fast=False, bos_token="<s>")
    with pytest.raises(DataError, match=r"does not say which characters.*give the model a fast"):
        lf.word_tokens(short, ["a"])
    short.tokenizer = None
    with pytest.raises(DataError, match="no tokenizer"):
        lf.word_tokens(short, ["a"])


def test_features_of_words_by_hand():
    table = lf.word_features([["The", "NASA", "te\u0301st,"], ["the", "7"]])
    expected = {
        "length": [3, 4, 5, 3, 1],
        "frequency": np.log([3, 2, 2, 3, 2]),
        "position": [0, 1, 2, 0, 1],
        "relative_position": [0, 0.5, 1, 0, 1],
        "sentence_length": [3, 3, 3, 2, 2],
        "capitalised": [1, 1, 0, 0, 0],
        "all_capitals": [0, 1, 0, 0, 0],
        "digit": [0, 0, 0, 0, 1],
        "punctuation": [0, 0, 1, 0, 0],
        "ends_with_punctuation": [0, 0, 1, 0, 0],
        "first": [1, 0, 0, 1, 0],
        "last": [0, 0, 1, 0, 1],
        "length_before": [0, 3, 4, 0, 3],
        "frequency_before": [0, np.log(3), np.log(2), 0, np.log(3)],
    }
    assert list(table) == list(expected)
    for name, column in expected.items():
        assert table[name].tolist() == pytest.approx(list(column)), name
