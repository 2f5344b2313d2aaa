"""Text to sequences: nothing lost, nothing mixed."""

import hashlib
import inspect

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

import lnfree_interp as lf
from lnfree_interp.data import packing
from lnfree_interp.data.packing import token_stream
from lnfree_interp.data.stdlib import split_of
from lnfree_interp.data.streams import PackedStream
from lnfree_interp.errors import DataError


def test_split_depends_on_the_path_alone():
    """These modules were held out when the bundled checkpoint was trained; they must stay so."""
    assert [split_of(p) for p in ("netrc.py", "asyncio/queues.py", "_pydecimal.py")] == [
        "heldout"
    ] * 3
    assert [split_of(p) for p in ("json/decoder.py", "os.py", "typing.py")] == ["train"] * 3
    # Moved by a later Python: same side as where they came from.
    assert split_of("sysconfig/__init__.py") == split_of("sysconfig.py") == "heldout"
    assert split_of("pathlib/_local.py") == split_of("pathlib.py")
    assert split_of("_pydatetime.py") == split_of("datetime.py")
    paths = [f"package/module_{i}.py" for i in range(4000)]
    share = sum(split_of(path) == "heldout" for path in paths) / len(paths)
    assert 0.08 < share < 0.12


def test_corpus_is_split_and_free_of_tests(tmp_path):
    train, heldout = (lf.stdlib_corpus(split) for split in ("train", "heldout"))
    assert not set(train["path"]) & set(heldout["path"])
    assert "netrc.py" in heldout["path"]
    assert "json/decoder.py" in train["path"]
    everything = [*train["path"], *heldout["path"]]
    assert not [p for p in everything if {"test", "tests", "site-packages"} & set(p.split("/"))]
    texts = {hashlib.sha256(t.encode()).hexdigest() for t in train["text"]}
    copies = [t for t in heldout["text"] if hashlib.sha256(t.encode()).hexdigest() in texts]
    assert sum(map(len, copies)) < 0.01 * sum(map(len, heldout["text"]))
    with pytest.raises(DataError, match="installed without its source"):
        lf.stdlib_corpus("train", root=tmp_path)


def test_packing_loses_nothing(tokenizer):
    texts = ["def add(self):\n", "x", "return " * 30]
    documents = Dataset.from_list([{"text": text} for text in texts])
    stream = token_stream(documents, tokenizer)
    expected = []
    for text in texts:
        expected += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert stream.tolist() == expected
    sequences = lf.pack(documents, tokenizer, sequence_length=8)
    assert sequences.shape == (len(expected) // 8, 8)
    assert sequences.flatten().tolist() == expected[: len(expected) // 8 * 8]
    assert torch.equal(lf.pack(iter(documents), tokenizer, sequence_length=8), sequences)


def test_the_loaded_model_s_tokenizer_packs_without_bos(gpt2_folder):
    """TransformerLens makes its tokenizer prepend BOS; documents must not start with two."""
    model = lf.load(gpt2_folder)
    plain = AutoTokenizer.from_pretrained(gpt2_folder)
    documents = [{"text": "def add(self):\n"}]
    assert torch.equal(token_stream(documents, model.tokenizer), token_stream(documents, plain))


def test_sequences_may_begin_with_the_beginning_of_text(tokenizer):
    """The text behind it is the same stream, cut one token earlier."""
    texts = [f"text number {i}, and some more of it" for i in range(12)]
    stream = token_stream(texts, tokenizer)
    packed = lf.pack(texts, tokenizer, 9, prepend_bos=True)
    assert packed.shape == (len(stream) // 8, 9)
    assert (packed[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(packed[:, 1:].flatten(), stream[: packed[:, 1:].numel()])
    taken = PackedStream(Dataset.from_dict({"text": texts}), tokenizer, 9, prepend_bos=True)
    plain = PackedStream(Dataset.from_dict({"text": texts}), tokenizer, 8)
    assert taken.fingerprint() != plain.fingerprint()
    rows = taken.take(5)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(rows[:, 1:], plain.take(5))
    state = taken.state_dict()
    following = taken.take(3)
    taken.load_state_dict(state)
    assert torch.equal(taken.take(3), following)


def test_a_beginning_of_text_that_cannot_be_prepended_is_refused(tokenizer):
    without = AutoTokenizer.from_pretrained(lf.bundled_checkpoint())
    without.bos_token = None
    with pytest.raises(DataError, match="no beginning-of-text token to prepend"):
        lf.pack(["some text"], without, 2, prepend_bos=True)
    with pytest.raises(DataError, match="make them longer"):
        lf.pack(["some text"], tokenizer, 1, prepend_bos=True)
    with pytest.raises(DataError, match="no beginning-of-text token to prepend"):
        lf.pack([[1, 2, 3]], None, 2, prepend_bos=True)


def test_unusable_text_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"no column 'text'.*'code'"):
        lf.pack([{"code": "x"}], tokenizer, 8)
    with pytest.raises(DataError, match="no documents"):
        lf.pack([], tokenizer, 8)
    with pytest.raises(DataError, match="sequence_length is 0"):
        lf.pack([{"text": "x"}], tokenizer, 0)
    with pytest.raises(DataError, match="too few for one sequence of 64"):
        lf.pack([{"text": "x"}], tokenizer, 64)


def test_documents_are_texts_token_ids_or_rows(tokenizer):
    texts = ["def add(self):\n", "x", "return " * 30]
    rows = [{"text": text} for text in texts]
    expected = lf.pack(rows, tokenizer, 8)
    assert torch.equal(lf.pack(texts, tokenizer, 8), expected)
    assert torch.equal(lf.pack((text for text in texts), tokenizer, 8), expected)
    assert torch.equal(lf.pack(tuple(texts), tokenizer, 8, "another column"), expected)
    assert lf.pack([[1, 2, 3], [4, 5]], tokenizer, 2).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("one text", r"is one str: give a list of documents, such as \[text\]"),
        ({"text": "x"}, "is one row: give a list of rows"),
        (DatasetDict({"a": Dataset.from_list([{"text": "x"}])}), r"the splits \['a'\]: choose one"),
        (["x", {"code": "y"}], r"no column 'text'.*\['code'\]"),
        ([], "no documents"),
        (iter([]), "no documents"),
        ([""], "the text has 1 tokens, too few for one sequence of 8"),
    ],
)
def test_what_is_no_list_of_documents_is_refused(documents, message, tokenizer):
    with pytest.raises(DataError, match=message):
        lf.pack(documents, tokenizer, 8)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (b"bytes", "is one bytes: give a list"),
        (None, "documents is a NoneType: give a list of texts"),
        ([None], "a document is a NoneType, neither text nor a list of token ids"),
        ([7, 8], "a document is a int, neither"),
        (["x", None], "a document is a NoneType, not text: remove that row"),
    ],
)
def test_what_the_type_checks_of_these_tests_would_refuse(documents, message, tokenizer):
    unchecked = inspect.unwrap(packing.token_stream)
    with pytest.raises(DataError, match=message):
        unchecked(documents, tokenizer)
