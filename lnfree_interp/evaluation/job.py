"""The options of `lnfree evaluate`. The module imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which models are compared."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL...")]
    """Hub ids (ID@REVISION for a revision), local folders, or runs."""
    original: str | None = None
    """The original, which the others are compared with; it is evaluated too. Default: what the run
    started from, if MODEL is one run."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, for checkpoints that have none."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What they are compared on."""

    data: str | None = None
    """The text: openwebtext-val, pile-10k or pile-10k-filtered; stdlib; local files; or a data set
    on the hub. Default: stdlib for the model that ships with the package and for runs that started
    from it; any other model needs it."""
    sequences: int | None = None
    """How many sequences of text. Default: all of a named text or of stdlib; 256 of another."""
    sequence_length: int | None = None
    """Tokens per sequence. Default: the smallest context of the models, up to 1024."""
    split: str | None = None
    """Split of the text. Default: heldout of stdlib, train of others."""
    data_name: str | None = None
    """Configuration of a data set on the hub."""
    column: str | None = None
    """Column of the text, or of token ids. Default: text, content, input_ids or tokens, the first
    that exists; else the only column of strings."""
    data_revision: str | None = None
    """Branch, tag or commit of the data set on the hub."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is measured, and how."""

    threshold: float = 3.5
    """Count the tokens whose loss is more than this many nats above the original's."""
    effects: bool = True
    """Measure the direct effect of every head, and compare it with its attribution."""
    neurons: int = 3
    """How many confidence neurons to find and ablate; 0: none."""
    pairs: int = 16
    """How many pairs of prompts to compare attribution patching with activation patching on; 0:
    none."""
    pairs_of: Literal["text", "ioi"] = "text"
    """text: pairs differ in one token of the text. ioi: pairs are prompts about an indirect object
    with two names swapped, as published with 480 of them."""
    depth: bool = True
    """Leave out each block in turn, to find the one that is needed least."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of matrix products. auto: bfloat16 if the hardware has it."""
    batch: int | None = None
    """Sequences per forward pass. Default: as many as fit into memory."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Tasks of the lm-evaluation-harness."""

    tasks: Annotated[tuple[str, ...], arg(metavar="TASK...")] = ()
    """Tasks of the lm-evaluation-harness, such as hellaswag. They need the extra `tasks`."""
    include: Path | None = None
    """Folder with your own task files."""
    limit: int | None = None
    """Examples per task. Default: all."""


@dataclass(frozen=True, kw_only=True)
class EvaluationJob(ModelOptions, TextOptions, MeasureOptions, TaskOptions):
    """An evaluation: models and a text by their names, and what to measure."""
