"""Text that a model writes itself, so that a removal needs no corpus."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from lnfree_interp.data.sequences import derived_seed
from lnfree_interp.errors import DataError, OutputError

_BATCH = 32
"""Sequences that are sampled together; a batch has a seed of its own, so that sampling can go on
where it stopped."""


def sample_text(
    model: HookedTransformer,
    sequences: int,
    sequence_length: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Int[Tensor, "sequence pos"]:
    """Text that the model writes itself: training text for `remove_norms` without a corpus.

    Every sequence begins with the tokenizer's beginning-of-text token, or its end-of-text token if
    it has no other, and goes on with tokens drawn from the model's own distribution. What the model
    seldom writes is seldom in it: a fine-tuning on it keeps the model as it is, and teaches it
    nothing.

    Args:
        model: Any model with a tokenizer.
        sequences: How many.
        sequence_length: Tokens per sequence, the first one included; at most the model's `n_ctx`.
        temperature: Divides the logits before a token is drawn; below 1 the text is more uniform.
        seed: The random seed. The same seed gives the same text on the same machine.
        progress: Whether to show a progress bar.

    Returns:
        Token ids [sequence, pos], int64, on the CPU, as `pack` returns them.

    Raises:
        DataError: if a number is not allowed, or the tokenizer has no token to begin with.

    Source:
        Data-free distillation of language models: LLM-QAT, arXiv 2305.17888.

    Examples:
        >>> lf.sample_text(model, 4, 16, progress=False).shape
        torch.Size([4, 16])
    """
    start = start_token(model)
    _require(model, sequences, sequence_length, temperature)
    draw = partial(_draw, model, start, sequence_length, temperature, seed)
    return torch.cat(list(_batches(draw, sequences, 0, progress)))


def write_samples(
    model: HookedTransformer,
    file: str | os.PathLike[str],
    sequences: int,
    sequence_length: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Write sampled text into a .jsonl file, whole batches at a time; a file that is there goes on.

    A row is `{"tokens": [...]}` without the first token: packed behind a beginning-of-text token
    (`prepend_bos`), rows fill sequences of `sequence_length`.

    Args:
        model: Any model with a tokenizer.
        file: To write, or to continue with the same arguments.
        sequences: How many rows it has in the end.
        sequence_length: Tokens per sequence, the first one included.
        temperature: See `sample_text`.
        seed: See `sample_text`.
        progress: Whether to show a progress bar.

    Returns:
        How many rows were there before and stay.

    Raises:
        DataError: if a number is not allowed, or the tokenizer has no token to begin with.
        OutputError: if the file holds something else, or was sampled in another way, or cannot be
            written.

    Source:
        See `sample_text`.

    Examples:
        >>> write_samples(model, "sampled.jsonl", 4000, 256)  # doctest: +SKIP
    """
    start = start_token(model)
    _require(model, sequences, sequence_length, temperature)
    made = {
        "model": model.cfg.model_name,
        "sequence_length": sequence_length,
        "temperature": temperature,
        "seed": seed,
    }
    path = Path(file)
    there = _rows(path, made)
    if there >= sequences:
        return there
    kept = there // _BATCH * _BATCH
    draw = partial(_draw, model, start, sequence_length, temperature, seed)
    try:
        _cut(path, kept)
        with path.open("a", encoding="utf-8") as out:
            for batch in _batches(draw, sequences, kept, progress):
                for row in batch[:, 1:].tolist():
                    out.write(json.dumps({"tokens": row, "sampled": made}) + "\n")
                out.flush()
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return kept


def start_token(model: HookedTransformer) -> int:
    """The token that sampled text begins with.

    Raises:
        DataError: if there is none.
    """
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(model.tokenizer, name, None)
        if token is not None:
            return token
    raise DataError(
        "the model's tokenizer has neither a beginning-of-text nor an end-of-text token, so that "
        "there is nothing to begin with: set its bos_token"
    )


def _require(
    model: HookedTransformer, sequences: int, sequence_length: int, temperature: float
) -> None:
    if sequences < 1:
        raise DataError(f"{sequences} sequences cannot be sampled: give 1 or more")
    if not 2 <= sequence_length <= model.cfg.n_ctx:
        raise DataError(
            f"sequences of {sequence_length} tokens cannot be sampled: give 2 to "
            f"{model.cfg.n_ctx}, the model's context"
        )
    if not 0 < temperature < float("inf"):
        raise DataError(f"temperature={temperature}: give a positive number")


def _batches(
    draw: Callable[[int], Int[Tensor, "batch pos"]], sequences: int, done: int, progress: bool
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Whole batches behind the first `done` sequences."""
    bar = tqdm(total=sequences, initial=done, unit="sequence", disable=not progress)
    with bar:
        for first in range(done, sequences, _BATCH):
            # Drawn whole even at the end: the text does not depend on how much is asked for.
            batch = draw(first)[: sequences - first]
            yield batch
            bar.update(len(batch))


@torch.no_grad()
def _draw(
    model: HookedTransformer,
    start: int,
    sequence_length: int,
    temperature: float,
    seed: int,
    first: int,
) -> Int[Tensor, "batch pos"]:
    """Not `model.generate`, which takes a beginning-of-text token that is the padding token too for
    padding, and hides it from attention."""
    generator = torch.Generator().manual_seed(derived_seed(seed, first))
    device = model.W_E.device
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, _BATCH)
    columns = [torch.full((_BATCH, 1), start)]
    while len(columns) < sequence_length:
        last = columns[-1].to(device)
        logits = model(last, past_kv_cache=cache, attention_mask=torch.ones_like(last))[:, -1]
        p = (logits.float().cpu() / temperature).softmax(-1)
        columns.append(torch.multinomial(p, 1, generator=generator))
    return torch.cat(columns, 1)


def _rows(path: Path, made: dict[str, Any]) -> int:
    """How many rows a file of samples has; a last one that was cut off does not count.

    Raises:
        OutputError: if it holds something else.
    """
    if not path.exists():
        return 0
    rows = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    break
                found = json.loads(line)["sampled"]
                if found != made:
                    raise OutputError(
                        f"{path} was sampled with {found}, not {made}: choose another name, or "
                        "give the same arguments to continue it"
                    )
                rows += 1
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise OutputError(f"{path} exists and is not sampled text: choose another name") from error
    return rows


def _cut(path: Path, rows: int) -> None:
    """Leave only the first rows of a file."""
    if not path.exists():
        return
    with path.open("r+", encoding="utf-8") as file:
        for _ in range(rows):
            file.readline()
        file.truncate(file.tell())
