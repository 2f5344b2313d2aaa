"""Opening text: local files, saved data sets, the hub's; and which column holds it."""

import gzip
import json

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, disable_progress_bars
from huggingface_hub import HfApi

import lnfree_interp as lf
from lnfree_interp.data import sources
from lnfree_interp.data.sources import open_sequences, open_text, text_column
from lnfree_interp.errors import DataError

TEXTS = ["def a():\n    pass\n", "x = 1\n\ny = 2\n", "for i in range(3):\n"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test writes to the user's cache."""
    disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    return tmp_path / "text"


def write(folder, kind, texts=TEXTS):
    """The documents in the files of one kind."""
    rows = Dataset.from_list([{"text": text} for text in texts])
    if kind in ("txt", "txt.gz"):
        for i, text in enumerate(texts):
            data = text.encode()
            (folder / f"{i}.{kind}").write_bytes(gzip.compress(data) if "gz" in kind else data)
    elif kind in ("jsonl", "jsonl.gz"):
        for i, text in enumerate(texts):
            data = (json.dumps({"text": text}) + "\n").encode()
            (folder / f"{i}.{kind}").write_bytes(gzip.compress(data) if "gz" in kind else data)
    elif kind == "json":
        (folder / "all.json").write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "csv":
        rows.to_csv(folder / "all.csv")
    elif kind == "parquet":
        rows.to_parquet(folder / "all.parquet")
    else:
        rows.save_to_disk(folder)


KINDS = ["txt", "txt.gz", "jsonl", "jsonl.gz", "json", "csv", "parquet", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_files_is_its_documents(kind, folder, tokenizer):
    write(folder, kind)
    (folder / "README.md").write_text("not text to train on")
    (folder / ".hidden.txt").write_text("nor this")
    documents = open_text(folder)
    assert isinstance(documents, Dataset)
    assert documents["text"][:] == TEXTS
    sequences = open_sequences(str(folder), tokenizer, 8, seed=1)
    assert torch.equal(sequences.take(5), open_sequences(folder, tokenizer, 8, seed=1).take(5))


def test_one_file_a_glob_and_an_arrow_file(folder):
    write(folder, "txt")
    assert open_text(folder / "1.txt")["text"][:] == TEXTS[1:2]
    assert open_text(f"{folder}/[12].txt")["text"][:] == TEXTS[1:]
    (folder / "below").mkdir()
    write(folder / "below", "txt", ["below\n"])
    assert open_text(f"{folder}/**/0.txt")["text"][:] == [TEXTS[0], "below\n"]
    assert open_text(folder)["text"][:] == [*TEXTS, "below\n"]
    write(folder / "saved", "saved")
    [arrow] = (folder / "saved").glob("*.arrow")
    assert open_text(arrow)["text"][:] == TEXTS
    assert open_text(arrow, split="train[1:]")["text"][:] == TEXTS[1:]


def test_a_changed_file_is_read_again(folder):
    write(folder, "txt")
    assert open_text(folder)["text"][:] == TEXTS
    (folder / "2.txt").write_text("something else altogether\n")
    assert open_text(folder)["text"][:] == [*TEXTS[:2], "something else altogether\n"]


def test_saved_splits(folder):
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder)
    assert open_text(folder)["text"][:] == TEXTS
    assert open_text(folder, split="test")["text"][:] == TEXTS[:1]
    with pytest.raises(DataError, match=r"has the splits \['train', 'test'\], not 'dev'"):
        open_text(folder, split="dev")


def test_the_standard_library(tokenizer):
    heldout = open_text("stdlib", split="heldout")
    assert heldout["path"][:] == lf.stdlib_corpus("heldout")["path"][:]
    sequences = open_sequences("stdlib", tokenizer, 16, split="heldout")
    assert sequences.take(2).shape == (2, 16)
    with pytest.raises(DataError, match=r"splits \['train', 'heldout'\], not 'validation'"):
        open_text("stdlib", split="validation")


@pytest.mark.parametrize(
    "source", ["./nothing", "/no/such/text", "corpus.jsonl", "a/b.txt.gz", "~/nothing", "a/b/c"]
)
def test_missing_files_are_not_asked_of_the_hub(source, monkeypatch):
    monkeypatch.setattr(sources, "_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file or folder"):
        open_text(source)


def test_unreadable_files_are_refused(folder, monkeypatch):
    monkeypatch.setattr(sources, "_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no file here can be read"):
        open_text(folder)
    with pytest.raises(DataError, match="no file here can be read"):
        open_text(f"{folder}/*.txt")
    (folder / "a.docx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.docx cannot be read; allowed are \.txt"):
        open_text(folder / "a.docx")
    (folder / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be read as parquet: "):
        open_text(folder)
    write(folder, "jsonl")
    with pytest.raises(DataError, match=r"different kinds \(json, parquet\)"):
        open_text(folder)
    with pytest.raises(DataError, match=r"cannot be read as json: .*validation"):
        open_text(f"{folder}/*.jsonl", split="validation")
    with pytest.raises(DataError, match="no such file or folder"):
        open_text("json")  # a format, which datasets would look for in the working folder


def test_the_hub_out_of_reach():
    """conftest.py has set HF_HUB_OFFLINE."""
    with pytest.raises(DataError, match=r"no-such/data: .*pass a local file .* or 'stdlib'"):
        open_text("no-such/data")


def test_what_the_hub_is_asked_for(monkeypatch):
    asked = {}

    def load(*args, **kwargs):
        asked["args"], asked["kwargs"] = args, kwargs
        return Dataset.from_list([{"text": "x"}]).to_iterable_dataset()

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(sources, "load_dataset", load)
    documents = open_text("owner/data", name="small", split="validation", revision="v1")
    assert isinstance(documents, IterableDataset)
    assert asked["args"] == ("owner/data", "small")
    assert asked["kwargs"] == {"split": "validation", "streaming": True, "revision": "v1"}

    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match=r"hub cannot be reached; pass a local file"):
        open_text("owner/data")


@pytest.mark.parametrize("stream", [False, True], ids=["map", "unknown-features"])
@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"content": "a", "text": "b"}, None, ("text", False)),
        ({"id": "a", "content": "b"}, None, ("content", False)),
        ({"id": 1, "code": "b"}, None, ("code", False)),
        ({"url": "a", "input_ids": [1]}, None, ("input_ids", True)),
        ({"text": "a", "tokens": [1]}, "tokens", ("tokens", True)),
        ({"tokens": ["a", "b"], "sentence": "a b"}, None, ("sentence", False)),
        ({"text": "a", "label": 1}, "body", r"no column 'body'.*\['text', 'label'\]"),
        ({"text": "a", "label": 1}, "label", "'label' holds neither"),
        ({"one": "a", "two": "b"}, None, r"name one of \['one', 'two'\]"),
        ({"label": 1}, None, r"name one of \['label'\]"),
    ],
)
def test_which_column_holds_the_text(row, column, expected, stream):
    documents = (
        IterableDataset.from_generator(lambda: iter([row])) if stream else Dataset.from_list([row])
    )
    if isinstance(expected, tuple):
        assert text_column(documents, column) == expected
    else:
        with pytest.raises(DataError, match=expected):
            text_column(documents, column)


def test_an_empty_stream_has_no_column():
    with pytest.raises(DataError, match="no documents"):
        text_column(IterableDataset.from_generator(lambda: iter([])), None)


def test_ids_and_columns_through_one_call(folder, tokenizer):
    rows = [{"url": "u", "input_ids": [i, i + 1, i + 2]} for i in range(9)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = open_sequences(folder, tokenizer, 3).take(9)
    assert sorted(taken.tolist()) == [row["input_ids"] for row in rows]
    with pytest.raises(DataError, match=r"no column 'text'.*'input_ids'"):
        open_sequences(folder, tokenizer, 3, column="text")


def test_what_is_no_name_of_a_text_is_refused():
    for source in (["a text"], None, 7):
        with pytest.raises(DataError, match="pack takes documents in memory"):
            sources.require_name(source)
    with pytest.raises(DataError, match="the name of the text is empty"):
        open_text(" ")
    with pytest.raises(DataError, match="the name of the text is empty"):
        lf.evaluation_text("", None, 8)
