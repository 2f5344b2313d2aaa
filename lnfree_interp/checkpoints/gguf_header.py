"""The header of a GGUF file, read so that no length in it is believed before it is checked.

The readers of `gguf` and `transformers` believe what a file states, and can run for ever on a
damaged one; so none of them sees a file that was not read here first.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType

from lnfree_interp.checkpoints.hub import first_line
from lnfree_interp.errors import CheckpointError, UnsupportedModelError

READ = ("gpt2", "llama", "qwen2", "qwen3", "gemma2")
"""llama.cpp's names of the architectures that are read."""

EMBEDDING = "token_embd.weight"

_NEEDED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
)

# Of the numbers that metadata can hold, as `struct` writes them.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

_FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.F64)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a file, and in which type."""

    shape: tuple[int, ...]
    kind: TensorType
    start: int
    """The first of its bytes."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.metadata.get("general.architecture"))

    def stated(self, key: str) -> Any:
        """A value under the name of the architecture, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer in it."""
        kind = self.metadata.get("tokenizer.ggml.model", "none")
        return kind not in ("none", "no_vocab") and "tokenizer.ggml.tokens" in self.metadata

    @property
    def numbers(self) -> int:
        """How many weights it holds."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def quantisation(self) -> str | None:
        """The name of it as llama.cpp writes it, such as Q4_K_M; None if there is none.

        `general.file_type`, unless it is missing, unknown, or not what the tensors are: then the
        type of most weights.
        """
        types = self._types()
        packed = [kind for kind in types if kind not in _FLOATS]
        if not packed:
            return None
        floats = {kind.name for kind in _FLOATS}
        try:
            # The flag says that the type was guessed.
            stated = int(self.metadata["general.file_type"]) & ~gguf.LlamaFileType.GUESSED
            name = gguf.LlamaFileType(stated).name.partition("_")[2]
        except (KeyError, TypeError, ValueError):
            return packed[0].name
        return packed[0].name if name in floats else name

    def _types(self) -> list[TensorType]:
        """The types of its tensors, that of most weights first."""
        sizes: Counter[TensorType] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.kind] += prod(tensor.shape)
        return [kind for kind, _ in sizes.most_common()]

    def describe(self, dtype: torch.dtype) -> str:
        """The format in words, for weights that are given out in a dtype."""
        if self.quantisation is None:
            return f"GGUF, not quantised ({self._types()[0].name})"
        given = str(dtype).removeprefix("torch.")
        return f"GGUF, quantised {self.quantisation}, dequantised to {given}"


class _Cursor:
    """Reads one value after the other, and never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size:,} bytes are announced at {self.at:,} of {len(self.data):,}")
        self.at += size
        return self.data[self.at - size : self.at]

    def many(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(f"<{kind}")))

    def one(self, kind: str) -> Any:
        return self.many(kind, 1)[0]

    def text(self) -> str:
        return self.take(self.one("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.one(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.one("I"), self.one("Q")
        if inner in _NUMBERS:
            return list(self.many(_NUMBERS[inner], count))
        if inner != _STRING:
            raise ValueError(f"an array of type {inner}")
        return [self.text() for _ in range(count)]


def read_header(file: Path) -> Header:
    """The header of a GGUF file, which must hold a whole model of an architecture that is read.

    Raises:
        CheckpointError: if it is no GGUF file, damaged, or not the whole of a model.
        UnsupportedModelError: for another architecture, or a type that cannot be dequantised.
    """
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file}: an empty file: download it again")
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as m:
            cursor = _Cursor(m)
            _require_version(cursor, file)
            header = _read(cursor, file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    except (ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{file}: damaged or truncated: {first_line(error):.200}. Download it again"
        ) from error
    _require_whole_model(header)
    return header


def _require_version(cursor: _Cursor, file: Path) -> None:
    if (magic := cursor.take(4)) != b"GGUF":
        raise CheckpointError(
            f"{file}: not a GGUF file, which begins with the letters GGUF; this one begins with "
            f"{magic!r}. Pass a GGUF file, a folder or a hub id"
        )
    number = cursor.one("I")
    if number & 0xFFFF == 0:
        raise UnsupportedModelError(
            f"{file}: a big-endian GGUF file, and only little-endian ones can be read: convert it "
            "with gguf_convert_endian.py of llama.cpp"
        )
    if number not in (2, 3):
        raise UnsupportedModelError(
            f"{file}: version {number} of GGUF; versions 2 and 3 can be read: convert the model "
            "again with a recent llama.cpp"
        )


def _read(cursor: _Cursor, file: Path) -> Header:
    n_tensors, n_values = cursor.many("Q", 2)
    metadata = {}
    for _ in range(n_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.one("I"))
    announced = []
    for _ in range(n_tensors):
        name, n_dims = cursor.text(), cursor.one("I")
        shape = cursor.many("Q", n_dims)[::-1]  # the fastest dimension comes first in the file
        announced.append((name, shape, cursor.one("I"), cursor.one("Q")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    begin = -(-cursor.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in announced:
        if name in tensors:
            raise ValueError(f"{name} is there twice")
        tensors[name] = StoredTensor(shape, _tensor_type(kind, name, file), begin + offset)
        size = _bytes_of(tensors[name], name)
        if begin + offset + size > len(cursor.data):
            raise ValueError(
                f"{name} ends at byte {begin + offset + size:,} of {len(cursor.data):,}"
            )
    return Header(file, metadata, tensors)


def _tensor_type(number: int, name: str, file: Path) -> TensorType:
    try:
        kind = TensorType(number)
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        known = next((kind.name for kind in TensorType if kind == number), f"number {number}")
        raise UnsupportedModelError(
            f"{file}: {name} is of type {known}, which gguf {version('gguf')} cannot dequantise: "
            "take a file in a common quantisation such as Q4_K_M or Q8_0, or a newer gguf"
        ) from error
    return kind


def _bytes_of(tensor: StoredTensor, name: str) -> int:
    block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    if not tensor.shape or tensor.shape[-1] % block:
        raise ValueError(f"{name} has shape {list(tensor.shape)} in blocks of {block}")
    return prod(tensor.shape) // block * size


def _require_whole_model(header: Header) -> None:
    """Refuse what holds no model, half of one, or one of another architecture."""
    file = header.file
    if "general.architecture" not in header.metadata:
        raise CheckpointError(f"{file}: it does not state general.architecture: download it again")
    if (kind := header.metadata.get("general.type", "model")) != "model":
        raise UnsupportedModelError(
            f"{file}: a GGUF file of type {kind!r}, and only whole models can be read: merge an "
            "adapter into its model with llama.cpp (llama-export-lora), or pass the model itself"
        )
    if header.architecture not in READ:
        raise UnsupportedModelError(
            f"{file}: GGUF architecture {header.architecture!r} is not supported; supported: "
            f"{', '.join(READ)}. Pass the original checkpoint if load reads its architecture"
        )
    if (parts := header.metadata.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(
            f"{file}: one of {parts} parts: join them with llama-gguf-split --merge"
        )
    if not header.tensors:
        raise CheckpointError(
            f"{file}: only a vocabulary: it holds no weights. Pass the file of the model"
        )
    epsilon = "layer_norm_epsilon" if header.architecture == "gpt2" else "layer_norm_rms_epsilon"
    needed = [*_NEEDED, f"attention.{epsilon}"]
    if header.architecture != "gpt2":
        # Without it transformers would not undo llama.cpp's order of queries and keys.
        needed.append("attention.head_count_kv")
    if missing := [key for key in needed if header.stated(key) is None]:
        raise CheckpointError(
            f"{file}: it does not state {header.architecture}.{missing[0]}: convert the model "
            "again with llama.cpp"
        )
    if EMBEDDING not in header.tensors:
        raise CheckpointError(f"{file}: it lacks {EMBEDDING}: download it again")
