"""What `lnfree remove` is asked to do. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True, kw_only=True)
class RemovalJob:
    """A removal: the model, the recipe and the text by their names. `run.json` keeps it."""

    model: Annotated[Positional[str | None], arg(metavar="[MODEL]")] = None
    """Hub id or local Hugging Face folder. Default: the small GPT-2 that ships with the package."""
    recipe: str = "distilled"
    """distilled, published-style, taper or at-once; for GPT-2 itself gpt2-small, gpt2-medium,
    gpt2-large, gpt2-xl or gpt2-small-2024."""
    data: str = "stdlib"
    """The text: stdlib, the source of Python's standard library; a .txt, .jsonl, .json, .parquet,
    .arrow or .csv file; a folder or a pattern of such files; a folder that save_to_disk wrote; or a
    data set on the hub, which is streamed."""
    steps: int | None = None
    """Optimiser steps. This and the following eleven options replace the recipe's own settings."""
    batch: int | None = None
    """Sequences of text per step, over all processes."""
    micro_batch: int | None = None
    """Sequences per forward pass and process."""
    lr: float | None = None
    """Peak learning rate."""
    distillation: float | None = None
    """Share of the KL divergence from the original model in the loss."""
    scale_anchor: float | None = None
    """Weight of the auxiliary loss that holds the scale of ln_final's input."""
    precision: Literal["auto", "bfloat16", "float32"] | None = None
    """Precision of matrix products. auto: bfloat16 if the hardware has it."""
    patience: int | None = None
    """Stop after this many evaluations without a lower loss."""
    evaluate_every: int | None = None
    """Steps between two evaluations."""
    seed: int | None = None
    """Random seed of the order of the text."""
    sequence_length: int | None = None
    """Tokens per sequence. Default: the recipe's, or the model's context up to 1024."""
    rollback: bool = False
    """If the run diverges, go back to the last good checkpoint and widen the gaps between events.
    Default: stop."""
    vanilla: bool = False
    """Run the control instead: the same steps, text and learning rates, but the norms stay."""
    heldout: int = 64
    """Sequences of text to evaluate on; 0: none. Of stdlib they are from its held-out modules; of
    another text they are the first ones, which the first epoch leaves out."""
    split: str = "train"
    """Split of the text."""
    data_name: str | None = None
    """Configuration of a data set on the hub."""
    column: str | None = None
    """Column of the text, or of token ids. Default: text, content, input_ids or tokens, the first
    that exists; else the only column of strings."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    data_revision: str | None = None
    """Branch, tag or commit of the data set on the hub."""
    checkpoint_every: int = 50
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two measurements of sigma drift and residual norms; 0: none."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to tensorboard or wandb."""
