"""Where text comes from: the standard library, local files, or a data set of the hub."""

import os
from collections.abc import Iterable
from copy import deepcopy
from glob import glob, has_magic
from pathlib import Path
from typing import Any, cast, get_args

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    load_dataset,
    load_from_disk,
)
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedTokenizerBase

from lnfree_interp.checkpoints.hub import HUB_TIMEOUT
from lnfree_interp.data.names import STDLIB
from lnfree_interp.data.stdlib import Split, stdlib_corpus
from lnfree_interp.data.streams import PackedStream
from lnfree_interp.errors import DataError

OFFLINE_WAYS = f"pass a local file or folder of text, or {STDLIB!r}, which need no network"

_KINDS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
}
_ZIPPED_KINDS = ("text", "json", "csv")  # as .gz
_KNOWN = f"{', '.join(_KINDS)} (or .gz of a text format)"

_TEXT_COLUMNS = ("text", "content")
_TOKEN_COLUMNS = ("input_ids", "tokens")


def open_text(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    name: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> Dataset | IterableDataset:
    """Documents to train or measure on, one per row.

    Args:
        source: One of
            `"stdlib"`: the standard library's modules (`stdlib_corpus`);
            a local file, a folder with everything below it, or a glob, of .txt (one document per
            file), .json, .jsonl, .parquet, .arrow or .csv, the text formats also as .gz, read in
            the order of their names;
            a folder that `Dataset.save_to_disk` wrote;
            or the id of a data set on the hub. Code that comes with a data set is never run.
        split: `"train"` or `"heldout"` of the standard library; any split of a data set on the
            hub. Local files have the split `"train"` and its slices, such as `"train[:95%]"`.
        name: The configuration of a data set on the hub.
        column: The column of text or of token ids. Default: "text", "content", "input_ids" or
            "tokens", the first of these that exists; else the only column of strings.
        revision: The branch, tag or commit of a data set on the hub.
        streaming: Whether a data set on the hub is read as it is needed instead of downloaded
            whole.

    Returns:
        A `Dataset`, or an `IterableDataset` for a streamed hub data set.

    Raises:
        DataError: if the text does not exist, cannot be read, or has no column of text.

    Examples:
        >>> from lnfree_interp.data.sources import open_text
        >>> open_text("stdlib", split="heldout").column_names
        ['path', 'text']
        >>> open_text("Skylion007/openwebtext", column="text")  # doctest: +SKIP
    """
    documents = _open(source, split, name, revision, streaming)
    text_column(documents, column)
    return documents


def open_sequences(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    sequence_length: int,
    *,
    split: str = "train",
    name: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    streaming: bool = True,
    prepend_bos: bool = False,
) -> PackedStream:
    """Packed sequences of a text, without end: for `remove_norms`, or to take some of them.

    Those of one document follow each other; `MixedSequences` mixes them for training.

    Args:
        source: `"stdlib"`, local files, or a data set on the hub; see `open_text`.
        tokenizer: The model's, with an end-of-text token; it may be `None` for token ids.
        sequence_length: Tokens per sequence, at most the model's `n_ctx`.
        split: Which split of the text; see `open_text`.
        name: The configuration of a data set on the hub.
        column: The column of text or of token ids. Default: see `open_text`.
        revision: The branch, tag or commit of a data set on the hub.
        seed: The random seed of the documents' order, if they are not streamed.
        streaming: Whether a data set on the hub is read as it is needed instead of downloaded
            whole.
        prepend_bos: Whether each sequence begins with the tokenizer's beginning-of-text token.

    Returns:
        A `PackedStream`; its `.take(n)` returns the next sequences, [n, pos].

    Raises:
        DataError: if the text does not exist or cannot be read, has no column of text, or the
            tokenizer has no end-of-text token.

    Examples:
        >>> lf.open_sequences("stdlib", model.tokenizer, sequence_length=128).take(2).shape
        torch.Size([2, 128])
    """
    documents = _open(source, split, name, revision, streaming)
    chosen, _ = text_column(documents, column)
    return PackedStream(
        documents, tokenizer, sequence_length, chosen, seed=seed, prepend_bos=prepend_bos
    )


def text_column(documents: Dataset | IterableDataset, column: str | None) -> tuple[str, bool]:
    """The column that holds the text, and whether it holds token ids instead of strings.

    Args:
        documents: The data set. If a stream does not know its columns, its first row is read.
        column: The column to use. Default: "text", "content", "input_ids" or "tokens", the first
            of these that exists; else the only column of strings.

    Raises:
        DataError: if there is no such column, or it holds neither strings nor lists of integers.
    """
    kinds = {key: _is_tokenised(feature) for key, feature in _features(documents).items()}
    if column is not None:
        if column not in kinds:
            raise DataError(f"no column {column!r} in the data; its columns are {list(kinds)}")
        if kinds[column] is None:
            raise DataError(f"column {column!r} holds neither text nor lists of token ids")
        return column, bool(kinds[column])
    for key in (*_TEXT_COLUMNS, *_TOKEN_COLUMNS):
        if kinds.get(key) is not None:
            return key, bool(kinds[key])
    strings = [key for key, tokenised in kinds.items() if tokenised is False]
    if len(strings) != 1:
        raise DataError(f"the column of text is not clear: name one of {strings or list(kinds)}")
    return strings[0], False


def described(source: str, documents: Dataset | IterableDataset) -> str:
    """The name of a text, and how many documents it has if that is known."""
    if isinstance(documents, IterableDataset):
        return f"{source}, streamed"
    return f"{source}, {len(documents):,} documents"


def _features(documents: Dataset | IterableDataset) -> Features:
    if documents.features is not None:
        return documents.features
    # A copy, because reading moves the position of a stream.
    first = next(iter(deepcopy(documents)), None)
    if first is None:
        raise DataError("there are no documents in the data")
    return Dataset.from_list([first]).features


def _is_tokenised(feature: Any) -> bool | None:
    """True for lists of integers, False for strings, None for anything else."""
    if isinstance(feature, Value):
        return False if "string" in feature.dtype else None
    item = getattr(feature, "feature", None)
    return True if isinstance(item, Value) and "int" in item.dtype else None


def _open(
    source: str | os.PathLike[str],
    split: str,
    name: str | None,
    revision: str | None,
    streaming: bool,
) -> Dataset | IterableDataset:
    require_name(source)
    text = os.fspath(source)
    local = text == STDLIB or has_magic(text) or Path(text).expanduser().exists()
    if local and (name or revision):
        raise DataError(f"{source} is local: only a data set on the hub has a name and a revision")
    if text == STDLIB:
        if split not in get_args(Split):
            raise DataError(f"{STDLIB} has the splits {list(get_args(Split))}, not {split!r}")
        return stdlib_corpus(cast(Split, split))
    path = Path(text).expanduser()
    if path.is_dir() and any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        return _saved(path, split)
    if path.is_dir():
        inside = (file for file in path.rglob("*") if not _hidden(file.relative_to(path)))
        return _local(text, [file for file in inside if file.is_file() and _kind(file)], split)
    if path.is_file():
        return _local(text, [path], split)
    if has_magic(text):
        matches = (Path(match) for match in glob(os.fspath(path), recursive=True))
        return _local(text, [file for file in matches if file.is_file()], split)
    if isinstance(source, os.PathLike) or _looks_local(text):
        raise DataError(f"{text}: no such file or folder")
    return _hub(text, split, name, revision, streaming)


def require_name(source: Any) -> None:
    """Refuse what is not the name of a text.

    Raises:
        DataError: if it is empty, or neither a string nor a path.
    """
    if not isinstance(source, str | os.PathLike):
        raise DataError(
            f"the text is a {type(source).__name__}: give the name of a file, a folder or a data "
            "set; pack takes documents in memory"
        )
    if not os.fspath(source).strip():
        raise DataError("the name of the text is empty: give a file, a folder or a data set")


def _looks_local(text: str) -> bool:
    """Whether this is no hub id, which is `name` or `owner/name`."""
    starts = ("/", "./", "../", "~", os.sep)
    if text.startswith(starts) or text.count("/") > 1:
        return True
    # datasets takes the name of a format for every such file in the working folder.
    return _kind(Path(text)) is not None or text in _KINDS.values()


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _kind(file: Path) -> str | None:
    """The reader of a file by its suffix."""
    if file.suffix.lower() != ".gz":
        return _KINDS.get(file.suffix.lower())
    kind = _KINDS.get(Path(file.stem).suffix.lower())
    return kind if kind in _ZIPPED_KINDS else None


def _local(source: str, files: Iterable[Path], split: str) -> Dataset:
    """Local files as one memory-mapped data set, in the order of their names."""
    files = sorted(files)
    if not files:
        raise DataError(f"{source}: no file here can be read; allowed are {_KNOWN}")
    unknown = [file.name for file in files if _kind(file) is None]
    if unknown:
        raise DataError(f"{source}: {unknown[0]} cannot be read; allowed are {_KNOWN}")
    kinds = sorted({str(_kind(file)) for file in files})
    if len(kinds) > 1:
        raise DataError(
            f"{source}: files of different kinds ({', '.join(kinds)}): choose one, such as *.txt"
        )
    options: dict[str, Any] = {"sample_by": "document"} if kinds == ["text"] else {}
    try:
        return load_dataset(
            kinds[0],
            data_files=[os.fspath(file.resolve()) for file in files],
            split=split,
            **options,
        )
    except Exception as error:  # whatever a reader raises, and the disk of the cache
        raise DataError(f"{source}: cannot be read as {kinds[0]}: {_reason(error)}") from error


def _saved(folder: Path, split: str) -> Dataset:
    """A folder that `save_to_disk` wrote."""
    try:
        saved = load_from_disk(os.fspath(folder))
    except Exception as error:  # a broken folder
        raise DataError(
            f"{folder}: cannot be read as a saved data set: {_reason(error)}"
        ) from error
    splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise DataError(f"{folder} has the splits {list(splits)}, not {split!r}")
    return splits[split]


def _hub(
    source: str, split: str, name: str | None, revision: str | None, streaming: bool
) -> Dataset | IterableDataset:
    try:
        # One request with a short time-out, instead of slow retries.
        HfApi().dataset_info(source, revision=revision, timeout=HUB_TIMEOUT)
    except OfflineModeIsEnabled:
        pass  # it may be in the cache
    except HFValidationError as error:
        raise DataError(f"{source}: no such file or folder, and not a hub id") from error
    except RevisionNotFoundError as error:
        raise DataError(f"{source}: no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"{source}: no such file or folder and no such hub data set") from error
    except Exception as error:  # no route, no name service, proxy
        raise DataError(f"{source}: the hub cannot be reached; {OFFLINE_WAYS}") from error
    try:
        return load_dataset(source, name, split=split, streaming=streaming, revision=revision)
    except ValueError as error:  # no such split or configuration
        raise DataError(f"{source}: {_reason(error)}") from error
    except Exception as error:  # gated, a format without text, a full disk, offline mode
        raise DataError(f"{source}: {_reason(error)}; {OFFLINE_WAYS}") from error


def _reason(error: BaseException) -> str:
    """The error in one line; datasets puts the real one into the cause."""
    error = error.__cause__ or error
    return " ".join(str(error).split()) or type(error).__name__
