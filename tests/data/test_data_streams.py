"""Endless sequences: nothing lost, nothing doubled, and every position found again."""

import json
import subprocess
import sys
import threading
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset

from lnfree_interp.data.mixed import MixedSequences
from lnfree_interp.data.prefetch import Prefetched
from lnfree_interp.data.sequences import ShuffledSequences, TokenSequences, share
from lnfree_interp.data.streams import PackedStream
from lnfree_interp.errors import DataError

LENGTH = 8
N_DOCUMENTS = 23


@pytest.fixture(autouse=True)
def few_documents_per_call(monkeypatch):
    """So that a few documents are several reads."""
    monkeypatch.setattr("lnfree_interp.data.streams.DOCUMENTS_PER_CALL", 4)


def texts():
    return [("x" * (i % 5)) + f"def f{i}(self):" * (i % 3) for i in range(N_DOCUMENTS)]


def in_memory():
    return Dataset.from_list([{"id": i, "text": text} for i, text in enumerate(texts())])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The documents in files of unequal length."""
    folder = tmp_path_factory.mktemp("shards")
    cuts = [0, 7, 8, 20, N_DOCUMENTS]
    for i, (start, stop) in enumerate(pairwise(cuts)):
        rows = [json.dumps({"id": n, "text": t}) for n, t in enumerate(texts())][start:stop]
        (folder / f"{i}.jsonl").write_text("\n".join(rows) + "\n")
        Dataset.from_list([json.loads(row) for row in rows]).to_parquet(
            folder / f"{i}.parquet", batch_size=3
        )
    return folder


def streamed(shards, kind="json"):
    suffix = {"json": "jsonl", "parquet": "parquet"}[kind]
    files = sorted(str(file) for file in shards.glob(f"*.{suffix}"))
    return load_dataset(kind, data_files=files, split="train", streaming=True)


def tokenised(tokenizer):
    """Rows of ids, one of them empty."""
    return Dataset.from_list(
        [{"input_ids": tokenizer(text)["input_ids"] if text else []} for text in texts()]
    )


def endless(kind, tokenizer, shards):
    """A fresh source of each kind."""
    if kind == "map":
        return PackedStream(in_memory(), tokenizer, LENGTH, seed=3)
    if kind == "tokens":
        return PackedStream(tokenised(tokenizer), tokenizer, LENGTH, "input_ids", seed=3)
    if kind == "shuffled":
        ids = torch.arange(11 * LENGTH).view(11, LENGTH)
        return ShuffledSequences(ids, seed=3)
    if kind == "mixed":
        return MixedSequences(PackedStream(streamed(shards), tokenizer, LENGTH), window=5, seed=1)
    if kind == "mixed-prefetched":
        source = PackedStream(in_memory(), tokenizer, LENGTH, seed=3)
        return Prefetched(MixedSequences(source, window=8))
    if kind == "prefetched":
        return Prefetched(PackedStream(streamed(shards), tokenizer, LENGTH))
    if kind == "plain-stream":  # no features, no files
        return PackedStream(
            IterableDataset.from_generator(lambda: ({"text": t} for t in texts())),
            tokenizer,
            LENGTH,
        )
    return PackedStream(streamed(shards, kind), tokenizer, LENGTH)


KINDS = [
    "map", "json", "parquet", "plain-stream", "tokens", "shuffled", "prefetched", "mixed",
    "mixed-prefetched",
]  # fmt: skip


def closed(tokenizer, text):
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_is_found_again(kind, tokenizer, shards):
    """Cut after every sequence, through several epochs, with resumed runs resumed in turn."""
    whole = endless(kind, tokenizer, shards)
    assert isinstance(whole, TokenSequences)
    sequences, epochs = [], []
    for _ in range(90):
        epochs.append(whole.epoch)
        sequences.append(whole.take(1))
    assert set(epochs) >= {0, 1, 2}
    for size in (1, 3, 7):
        run = endless(kind, tokenizer, shards)
        beginning = run.state_dict()
        for start in range(0, 84, size):
            assert run.epoch == epochs[start]
            wanted = torch.cat(sequences[start : start + size])
            state = json.loads(json.dumps(run.state_dict()))
            assert torch.equal(run.take(size), wanted), (size, start)
            run.load_state_dict(state)  # back, in the object that has read on
            assert torch.equal(run.take(size), wanted), (size, start)
            resumed = endless(kind, tokenizer, shards)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert resumed.epoch == epochs[start]
            assert torch.equal(resumed.take(size), wanted), (size, start)
            assert resumed.state_dict() == run.state_dict()
            run = resumed
        run.load_state_dict(beginning)
        assert torch.equal(run.take(9), torch.cat(sequences[:9]))
        run.load_state_dict(state)
        assert torch.equal(run.take(size), wanted)


@pytest.mark.parametrize("kind", ["json", "parquet", "plain-stream"])
def test_a_stream_is_its_documents_in_order(kind, tokenizer, shards):
    one_pass = [token for text in texts() for token in closed(tokenizer, text)]
    n = len(one_pass) // LENGTH
    stream = endless(kind, tokenizer, shards)
    got = stream.take(n - 1)
    assert got.dtype == torch.int64
    assert got.flatten().tolist() == one_pass[: (n - 1) * LENGTH]
    rest = one_pass[(n - 1) * LENGTH :]
    assert stream.epoch == 0  # the next sequence begins with the rest
    assert stream.take(2).flatten()[: len(rest)].tolist() == rest
    assert stream.epoch == 1


def documents_of(tokens, end):
    """Token lists between ends of text."""
    found, current = [], []
    for token in tokens:
        if token == end:
            found.append(tuple(current))
            current = []
        else:
            current.append(token)
    return found


def test_each_epoch_has_every_document_once_in_another_order(tokenizer):
    stream = PackedStream(in_memory(), tokenizer, LENGTH, seed=0)
    expected = Counter(tuple(tokenizer(text)["input_ids"]) for text in texts())
    length = sum(len(closed(tokenizer, text)) for text in texts())
    found = documents_of(
        stream.take(3 * length // LENGTH + 1).flatten().tolist(), tokenizer.eos_token_id
    )
    epochs = [found[i * N_DOCUMENTS : (i + 1) * N_DOCUMENTS] for i in range(3)]
    assert all(Counter(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    same, other = (PackedStream(in_memory(), tokenizer, LENGTH, seed=s).take(5) for s in (0, 1))
    again = PackedStream(in_memory(), tokenizer, LENGTH, seed=0)
    assert torch.equal(again.take(5), same)
    assert not torch.equal(other, same)


def test_rows_of_ids_are_joined_as_they_are(tokenizer):
    rows = [{"tokens": [1, 2, 3]}, {"tokens": []}, {"tokens": [4, 5, 6, 7]}]
    stream = PackedStream(
        IterableDataset.from_generator(lambda: iter(rows)), None, 5, column="tokens"
    )
    assert stream.take(2).tolist() == [[1, 2, 3, 4, 5], [6, 7, 1, 2, 3]]


def test_shuffled_blocks_come_once_an_epoch():
    sequences = torch.arange(20).view(10, 2)
    source = ShuffledSequences(sequences, seed=1)
    taken = source.take(25)
    epochs = [taken[i * 10 : (i + 1) * 10, 0].tolist() for i in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sequences[:, 0].tolist()
    assert epochs[0] != epochs[1]
    assert len(set(epochs[2])) == 5
    assert (source.epoch, source.state_dict()) == (2, {"taken": 25})
    # An epoch of one seed is not another epoch of the next seed.
    assert ShuffledSequences(sequences, seed=2).take(10)[:, 0].tolist() not in epochs


def test_mixing_gives_each_window_in_another_order():
    in_order = torch.arange(60).view(30, 2)

    class InOrder(ShuffledSequences):
        def take(self, n):
            self._taken += n
            return in_order[self._taken - n : self._taken]

    mixed = MixedSequences(InOrder(in_order, seed=0), window=10, seed=1)
    got = torch.cat([mixed.take(n) for n in (3, 11, 1, 15)])
    windows = [got[i * 10 : (i + 1) * 10] for i in range(3)]
    for number, window in enumerate(windows):
        right = in_order[number * 10 : (number + 1) * 10]
        assert torch.equal(window.sort(0).values, right)
        assert not torch.equal(window, right)
    assert not torch.equal(windows[0], windows[1] - 20)
    other = MixedSequences(InOrder(in_order, seed=0), window=10, seed=2)
    assert other.fingerprint() != mixed.fingerprint()
    assert not torch.equal(other.take(10), windows[0])
    with pytest.raises(DataError, match="give 1 or more"):
        MixedSequences(InOrder(in_order, seed=0), window=0)


def test_a_window_ends_with_the_epoch(tokenizer):
    """Every sequence once before any comes again; what is left out of an epoch stays out."""
    rows = Dataset.from_list([{"input_ids": [i] * LENGTH} for i in range(7)])
    source = PackedStream(rows, tokenizer, LENGTH, "input_ids")
    held_out = source.take(2)[:, 0].tolist()
    mixed = MixedSequences(source, window=1024)
    assert mixed.epoch == 0
    first = mixed.take(5)[:, 0].tolist()
    assert sorted([*first, *held_out]) == list(range(7))
    assert mixed.epoch == 1
    second = torch.cat([mixed.take(3), mixed.take(4)])[:, 0].tolist()
    assert sorted(second) == list(range(7))
    assert mixed.epoch == 2


def test_a_window_that_cannot_be_read_leaves_the_position(tokenizer):
    rows = Dataset.from_list([{"input_ids": [*range(LENGTH)]}] * 3)
    mixed = MixedSequences(PackedStream(rows, tokenizer, LENGTH, "input_ids"), window=2)
    right, source = mixed.take(1), mixed._sequences
    before, take = mixed.state_dict(), source.take
    source.take = lambda n: (_ for _ in ()).throw(DataError("no disk"))
    with pytest.raises(DataError, match="no disk"):
        mixed.take(3)
    source.take = take
    assert mixed.state_dict() == before
    again = MixedSequences(PackedStream(rows, tokenizer, LENGTH, "input_ids"), window=2)
    assert torch.equal(torch.cat([right, mixed.take(3)]), again.take(4))


def test_the_data_set_given_is_left_as_it_is(tokenizer, shards):
    rows = IterableDataset.from_generator(lambda: ({"text": t} for t in texts()))
    rows = rows.filter(lambda row: True)  # a view, whose inside datasets does not copy
    reader = iter(rows)
    first = list(islice(reader, 9))
    state = rows.state_dict()
    stream = PackedStream(rows, tokenizer, LENGTH)
    expected = endless("json", tokenizer, shards).take(6)
    assert torch.equal(stream.take(6), expected)  # from the beginning, though 9 rows were read
    assert rows.state_dict() == state
    assert [row["text"] for row in [*first, *islice(reader, 3)]] == texts()[:12]
    rows.load_state_dict(rows.state_dict())
    assert [row["text"] for row in rows] == texts()[12:]


@pytest.mark.parametrize("kind", ["map", "json", "tokens", "shuffled"])
def test_fingerprints_tell_texts_apart(kind, tokenizer, shards):
    assert (
        endless(kind, tokenizer, shards).fingerprint()
        == endless(kind, tokenizer, shards).fingerprint()
    )
    if kind in ("shuffled", "tokens"):
        return
    rows = streamed(shards) if kind == "json" else in_memory()
    same = PackedStream(rows, tokenizer, LENGTH).fingerprint()
    other_rows = Dataset.from_list([{"text": t + "!"} for t in texts()])
    others = [
        PackedStream(rows, tokenizer, LENGTH + 1).fingerprint(),
        PackedStream(other_rows, tokenizer, LENGTH).fingerprint(),
        PackedStream(rows.take(5), tokenizer, LENGTH, column="id").fingerprint(),
    ]
    if kind == "map":
        others.append(PackedStream(rows, tokenizer, LENGTH, seed=1).fingerprint())
        others.append(PackedStream(rows.select(range(9)), tokenizer, LENGTH).fingerprint())
    assert len({same, *others}) == 1 + len(others)


def test_short_text_repeats_until_a_block_is_full(tokenizer):
    document = closed(tokenizer, "x")
    stream = PackedStream(Dataset.from_list([{"text": "x"}]), tokenizer, 64)
    assert stream.take(1)[0].tolist() == (document * 64)[:64]
    assert stream.epoch == 64 // len(document)


def test_text_without_a_token_is_refused(tokenizer):
    with pytest.raises(DataError, match="no documents"):
        PackedStream(Dataset.from_dict({"text": []}), tokenizer, LENGTH)
    with pytest.raises(DataError, match="no documents"):
        PackedStream(IterableDataset.from_generator(lambda: iter([])), tokenizer, LENGTH)
    empty = Dataset.from_list([{"input_ids": []}] * 9)
    for documents in (empty, empty.to_iterable_dataset()):
        with pytest.raises(DataError, match="not one token in"):
            PackedStream(documents, tokenizer, LENGTH, "input_ids").take(1)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"code": "x"}], "no column 'text'.*'code'"),
        ([{"text": "x"}, {"text": None}], "a document is a NoneType"),
        ([{"text": None}, {"text": "x"}], "neither text nor"),
        ([{"text": [1, 296]}], "token id 296 is outside .* of 296"),
        ([{"text": [1, -1]}], "token id -1"),
        ([{"text": [0.5]}], "neither text nor a list of token ids"),
    ],
)
def test_unusable_documents_are_refused_and_stay_unread(rows, message, stream, tokenizer):
    documents = Dataset.from_list(rows)
    with pytest.raises(DataError, match=message):  # noqa: PT012
        source = PackedStream(
            documents.to_iterable_dataset() if stream else documents, tokenizer, LENGTH
        )
        before = source.state_dict()
        with pytest.raises(DataError, match=message):
            source.take(1)
        assert source.state_dict() == before
        source.take(1)


@pytest.mark.parametrize("prefetched", [False, True])
def test_a_failed_read_is_not_the_end_of_the_text(prefetched, tokenizer):
    failures = [True]

    def rows():
        for i, text in enumerate(texts()):
            if i == 9 and failures:
                failures.pop()
                raise OSError("connection lost")
            yield {"text": text}

    stream = PackedStream(IterableDataset.from_generator(rows), tokenizer, LENGTH)
    stream = Prefetched(stream) if prefetched else stream
    one_pass = [token for text in texts() for token in closed(tokenizer, text)]
    n = len(one_pass) // LENGTH
    with pytest.raises(DataError, match=r"cannot be read any further: .*connection lost"):
        stream.take(n)
    assert stream.take(n).flatten().tolist() == one_pass[: n * LENGTH]


def test_arguments_are_checked(tokenizer):
    with pytest.raises(DataError, match="sequence_length is 0"):
        PackedStream(in_memory(), tokenizer, 0)
    with pytest.raises(DataError, match="no tokens in sequences"):
        ShuffledSequences(torch.zeros(0, 4, dtype=torch.long), seed=0)
    for sequences in (
        PackedStream(in_memory(), tokenizer, 4),
        ShuffledSequences(torch.ones(2, 4).long(), seed=0),
    ):
        with pytest.raises(DataError, match="0 sequences cannot be taken"):
            sequences.take(0)


def test_prefetching_changes_nothing(tokenizer):
    plain = PackedStream(in_memory(), tokenizer, LENGTH)
    before = set(threading.enumerate())
    with Prefetched(PackedStream(in_memory(), tokenizer, LENGTH)) as ahead:
        assert (ahead.sequence_length, ahead.fingerprint()) == (LENGTH, plain.fingerprint())
        for n in (2, 2, 2, 5, 1, 1, 3, 40, 2):
            assert ahead.state_dict() == plain.state_dict()
            assert torch.equal(ahead.take(n), plain.take(n))
            assert ahead.epoch == plain.epoch
        state = ahead.state_dict()
        source = ahead._sequences
    ahead.close()
    assert set(threading.enumerate()) <= before
    assert source.state_dict() == state == plain.state_dict()
    assert torch.equal(source.take(3), plain.take(3))
    with pytest.raises(DataError, match="closed"):
        ahead.take(1)


def test_errors_of_the_thread_surface_in_take(tokenizer):
    rows = [{"text": [1] * 8}, {"text": [2] * 9}, {"text": [3] * 8}, {"text": [4] * 8}]
    broken = Dataset.from_list([*rows, {"text": [999]}]).to_iterable_dataset()
    with Prefetched(PackedStream(broken, tokenizer, 8)) as ahead:
        assert ahead.take(1).tolist() == [[1] * 8]
        state = ahead.state_dict()
        assert ahead.take(1).tolist() == [[2] * 8]
        for _ in range(2):
            with pytest.raises(DataError, match="token id 999"):
                ahead.take(9)
        ahead.load_state_dict(state)
        assert ahead.take(1).tolist() == [[2] * 8]


def test_an_unclosed_thread_does_not_keep_the_interpreter():
    code = (
        "import torch; from lnfree_interp.data.sequences import ShuffledSequences\n"
        "from lnfree_interp.data.prefetch import Prefetched\n"
        "ahead = Prefetched(ShuffledSequences(torch.ones(4, 8).long(), 0))\n"
        "ahead.take(2)\n"
        "raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7


def test_processes_share_a_batch_without_overlap():
    batch = torch.arange(24).view(12, 2)
    parts = [share(batch, rank, 4) for rank in range(4)]
    assert all(part.shape == (3, 2) for part in parts)
    assert torch.equal(torch.cat(parts).sort(dim=0).values, batch)
    with pytest.raises(DataError, match="12 sequences cannot be divided among 5"):
        share(batch, 0, 5)
    with pytest.raises(DataError, match="rank 4 is not one of 4"):
        share(batch, 4, 4)
