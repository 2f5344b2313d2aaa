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
from lnfree_interp.data.stdlib import Split, stdlib_corpus
from lnfree_interp.data.streams import PackedStream
from lnfree_interp.errors import DataError

STDLIB = "stdlib"
"""The source that every machine has: the running Python's own library."""

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
    """Documents to train or measure on, one a row.

    Args:
        source: One of
            `"stdlib"`: the standard library's modules (`stdlib_corpus`);
            a local file, a folder with everything below it, or a glob, of .txt (one document a
            file), .json, .jsonl, .parquet, .arrow or .csv, the text formats also as .gz, read in
            the order of their names; or a folder written by `Dataset.save_to_disk`;
            anything else: the id of a data set of the hub. Code that comes with it is never run.
        split: `"train"` or `"heldout"` of the standard library, any split of the hub's. All local
            files are the split `"train"`; its slices, such as `"train[:95%]"`, work.
        name: The hub data set's configuration.
        column: Must hold text or token ids. Default: the choice of `text_column`.
        revision: The hub data set's branch, tag or commit.
        streaming: Whether a hub data set is read as it is needed, rather than downloaded whole.

    Returns:
        A `Dataset`, or an `IterableDataset` for a streamed hub data set.

    Raises:
        DataError: if there is no such text, it cannot be read, or has no column of text.

    Examples:
        >>> from lnfree_interp.data.sources import open_text
        >>> open_text("stdlib", split="heldout").column_names
        ['path', 'text']
        >>> open_text("Skylion007/openwebtext", column="text")  # doctest: +SKIP
    """
    documents = _open(source, split, name, revision, streaming)
    text_column(documents, column)
    return documents


def open_blocks(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    block: int,
    *,
    split: str = "train",
    name: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    streaming: bool = True,
) -> PackedStream:
    """An endless source of packed blocks: `open_text`, then `PackedStream`.

    Args:
        source: As for `open_text`, like all that is not named here.
        tokenizer: As for `PackedStream`, like `block` and `seed`.
        block: Tokens per block.
        split: See `open_text`.
        name: See `open_text`.
        column: See `open_text`.
        revision: See `open_text`.
        seed: Of the documents' order, where they are not streamed.
        streaming: See `open_text`.

    Returns:
        A `PackedStream`; `.take(n)` gives the next blocks, [n, block].

    Raises:
        DataError: as `open_text` and `PackedStream`.

    Examples:
        >>> from lnfree_interp.data.sources import open_blocks
        >>> open_blocks("stdlib", model.tokenizer, block=128).take(2).shape
        torch.Size([2, 128])
    """
    documents = _open(source, split, name, revision, streaming)
    chosen, _ = text_column(documents, column)
    return PackedStream(documents, tokenizer, block, chosen, seed=seed)


def text_column(documents: Dataset | IterableDataset, column: str | None) -> tuple[str, bool]:
    """The column that holds the text, and whether it holds token ids in place of strings.

    Args:
        documents: If a stream does not know its columns, its first row is read.
        column: The wanted one. Default: "text", "content", "input_ids" or "tokens", the first that
            there is; else the only column of strings.

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
        raise DataError(f"which column holds the text? name one of {strings or list(kinds)}")
    return strings[0], False


def _features(documents: Dataset | IterableDataset) -> Features:
    if documents.features is not None:
        return documents.features
    # A copy, because reading moves the position of a stream.
    first = next(iter(deepcopy(documents)), None)
    if first is None:
        raise DataError("the data holds no documents")
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
    text = os.fspath(source)
    if not text.strip():
        raise DataError("text without a name: give a file, a folder or a data set")
    local = text == STDLIB or has_magic(text) or Path(text).expanduser().exists()
    if local and (name or revision):
        raise DataError(f"{source} is local: a name and a revision are for data sets on the hub")
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


def _looks_local(text: str) -> bool:
    """Whether this cannot be meant as a hub id: `name` or `owner/name`."""
    starts = ("/", "./", "../", "~", os.sep)
    if text.startswith(starts) or text.count("/") > 1:
        return True
    # To datasets the name of a format means every such file in the working folder.
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
        raise DataError(f"{source}: no files here that can be read: {_KNOWN}")
    unknown = [file.name for file in files if _kind(file) is None]
    if unknown:
        raise DataError(f"{source}: {unknown[0]} is of an unknown kind; use {_KNOWN}")
    kinds = sorted({str(_kind(file)) for file in files})
    if len(kinds) > 1:
        raise DataError(f"{source}: files of different kinds ({', '.join(kinds)}); name one: *.txt")
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
    """What `save_to_disk` wrote."""
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
        # One question with a short time-out, in place of slow retries.
        HfApi().dataset_info(source, revision=revision, timeout=HUB_TIMEOUT)
    except OfflineModeIsEnabled:
        pass  # the cache may hold it
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
    """What went wrong, in one line; datasets puts it into the cause."""
    error = error.__cause__ or error
    return " ".join(str(error).split()) or type(error).__name__
