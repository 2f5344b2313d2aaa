"""What `lnfree remove` is asked to do. Imports nothing heavy, so that `--help` is quick.

Each class is a group of options on the command line; `RemovalJob` is all of them. An option with
the name of a setting of the recipe replaces it. `sigma_` and `special_` stand before the settings
of `Statistics` and `Special`.
"""

import difflib
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from lnfree_interp.data.names import is_bundled, text_for
from lnfree_interp.errors import RecipeError
from lnfree_interp.models.site_names import SplitKind

RECIPES = (
    "measured",
    "distilled",
    "published-style",
    "taper",
    "at-once",
    "gpt2-small",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "gpt2-small-2024",
)
"""The names of the recipes in `removal.recipes.BY_NAME`."""

MEASURED = RECIPES[0]
"""The recipe that needs a measurement."""


Kinds = Annotated[tuple[SplitKind, ...] | None, arg(metavar="KIND...")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and what is done with it."""

    model: Annotated[Positional[str | None], arg(metavar="[MODEL]")] = None
    """Hub id, local Hugging Face folder or GGUF file. Default: the small GPT-2 that ships with the
    package."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    recipe: str = MEASURED
    """measured, distilled, published-style, taper or at-once; for GPT-2 itself gpt2-small,
    gpt2-medium, gpt2-large, gpt2-xl or gpt2-small-2024. measured measures what each norm costs
    before the first step, and lets norms go slowly if it finds massive activations."""
    teacher: str | None = None
    """Hub id, id@revision or local folder of the model to distil from, such as the original of a
    MODEL some of whose norms are gone. Default: MODEL as it is before the first step."""
    costs: str | None = None
    """File of what each norm costs: read if it exists, else written when that has been measured, so
    that the next run of this model need not measure."""
    kinds: Kinds = None
    """Kinds of norm sites to remove, such as ln1.qk ln1.v ln_final; the others stay live. Default:
    all."""
    keep: Annotated[tuple[str, ...] | None, arg(metavar="SITE...")] = None
    """Norm sites that stay live, by name or by a pattern in quotes, such as blocks.8.ln2 or
    'blocks.[0-9].ln2'. Default: none."""
    vanilla: bool = False
    """Run the control instead: the same steps, text and learning rates, but the norms stay."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What the model is trained on."""

    data: str | None = None
    """The text: stdlib, the source of Python's standard library; a .txt, .jsonl, .json, .parquet,
    .arrow or .csv file; a folder or a pattern of such files; a folder that save_to_disk wrote; or a
    data set on the hub, which is streamed. Default: stdlib for the model that ships with the
    package; any other model needs it."""
    split: str = "train"
    """Split of the text."""
    data_name: str | None = None
    """Configuration of a data set on the hub."""
    column: str | None = None
    """Column of the text, or of token ids. Default: text, content, input_ids or tokens, the first
    that exists; else the only column of strings."""
    data_revision: str | None = None
    """Branch, tag or commit of the data set on the hub."""
    prepend_bos: bool | None = None
    """Whether each sequence begins with the beginning-of-text token. Default: if the measurement of
    the recipe measured finds that position 0 needs a sigma of its own; else not."""
    heldout: int = 64
    """Sequences of text to evaluate on; 0: none. Of stdlib they are from its held-out modules; of
    another text they are the first ones, which the first epoch leaves out."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """In place of the recipe's own settings. Default: the recipe's; see --plan."""

    steps: int | None = None
    """Optimiser steps."""
    batch: int | None = None
    """Sequences of text per step, over all processes."""
    micro_batch: int | None = None
    """Sequences per forward pass and process."""
    sequence_length: int | None = None
    """Tokens per sequence. Default: the recipe's, or the model's context up to 1024."""
    lr: float | None = None
    """Peak learning rate."""
    trainable: Annotated[tuple[str, ...] | None, arg(metavar="WORD...")] = None
    """Which parameters are trained: all, norms, heads, mlps, biases or scalers; some of these by
    kind, layer or name, such as norms:ln2, norms:L3 or heads:L3H1; a component such as embed or
    blocks.0.mlp; or a share drawn by chance, '20% of norms'. All others stay what they are."""
    release: Annotated[tuple[str, ...] | None, arg(metavar="WORD@STEP...")] = None
    """What is trained too from some step on, in this order: mlps@100, norms+heads:L3@100, or
    all@still, when the loss stands still."""
    weight_average: float | None = None
    """Share of its old value that a moving average of the weights keeps at each step, once all
    sites are frozen; the finished model has the average. 0: the weights of the last step."""
    distillation: float | None = None
    """Share of the KL divergence from the original model in the loss."""
    scale_anchor: float | None = None
    """Weight of the auxiliary loss that holds the scale of ln_final's input."""
    repeats: float | None = None
    """Share of the sequences that are given a stretch of one token, again and again."""
    random_tokens: float | None = None
    """Share of the sequences that are given a stretch of tokens from the whole vocabulary."""
    embedding_cap: float | None = None
    """How long a row of W_E may be before the first step, in units of the text's mean. 0: no
    cap."""
    precision: Literal["auto", "bfloat16", "float32", "int16", "int12", "int10", "int8"] | None = (
        None
    )
    """Precision of matrix products. auto: bfloat16 if the hardware has it. int16 to int8: linear
    layers, norms and embeddings compute with integers of so many bits, forward and backward; all
    but int8 are simulated, and slow."""
    patience: int | None = None
    """Stop after this many evaluations without a lower loss."""
    evaluate_every: int | None = None
    """Steps between two evaluations."""
    seed: int | None = None
    """Random seed of the order of the text."""
    rollback: bool = False
    """If the run diverges, go back to the last good checkpoint and widen the gaps between events.
    Default: stop."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """When each norm site is frozen. Default: the recipe's schedule; see --plan."""

    start: int | None = None
    """Step of the first event; the others move with it."""
    gap: int | None = None
    """Steps from one norm site to the next, site by site in the published order."""
    taper: int | None = None
    """Steps that each site takes to fade from live to frozen; 0: none."""


@dataclass(frozen=True, kw_only=True)
class SigmaOptions:
    """How sigma is measured, by which a frozen norm divides. Default: the recipe's way."""

    sigma_average: Literal["mean", "rms", "least_squares"] | None = None
    """Average of the tokens' standard deviations."""
    sigma_source: Literal["start", "event", "ema", "batch"] | None = None
    """start: some text before the first step. event: the same text when the site's event comes.
    ema, batch: the text of each step, as a moving average or of the latest step alone."""
    sigma_sequences: int | None = None
    """Sequences that are measured for start and event."""
    sigma_momentum: float | None = None
    """Share of the old average that a step of ema keeps."""
    sigma_tokens: Literal["all", "ordinary"] | None = None
    """Which tokens count. ordinary: all but position 0, end-of-text and outliers."""
    sigma_share_ln1: bool | None = None
    """Whether ln1.qk and ln1.v have one sigma."""
    sigma_follow_frozen: bool | None = None
    """Whether ema and batch move the sigma of a frozen site until the last event."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokenOptions:
    """Tokens with a sigma of their own during the transition. Default: the recipe's."""

    special_first_until: int | None = None
    """Step at which position 0 gets the common sigma; 0: it always has it."""
    special_keep_first: bool | None = None
    """Whether position 0 keeps its sigma in the finished model, which is then not folded."""
    special_outliers_until: int | None = None
    """Step at which tokens far above the others get the common sigma; until then a cap on how large
    they may come out rises. 0: there is no cap."""
    special_outliers_from: int | None = None
    """Step from which that cap rises."""
    special_outlier_caps: Annotated[tuple[float, float] | None, arg(metavar="FIRST LAST")] = None
    """That cap at first and just before it is gone, as multiples of what a live norm makes of a
    token."""
    special_outliers_stay: bool | None = None
    """Whether that cap stays from there on, to the last step."""
    special_end_of_text_until: int | None = None
    """Step at which end-of-text tokens get the common sigma; 0: they always have it."""
    special_end_of_text_kinds: Kinds = None
    """Kinds of norm sites at which end-of-text is special, such as ln1.v; default: all."""


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What is written while the run goes on."""

    checkpoint_every: int = 50
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two measurements of sigma drift and residual norms; 0: none."""
    track: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...], arg(metavar="{tensorboard,wandb}...")
    ] = ()
    """Also log to tensorboard or wandb."""


@dataclass(frozen=True, kw_only=True)
class RemovalJob(
    ModelOptions,
    TextOptions,
    TrainingOptions,
    ScheduleOptions,
    SigmaOptions,
    SpecialTokenOptions,
    RecordOptions,
):
    """A removal: the model, the recipe and the text by their names. `run.json` keeps it.

    Raises:
        RecipeError: if there is no such recipe.
        DataError: if no text is named for a model other than the bundled one.
    """

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            near = difflib.get_close_matches(self.recipe.lower(), RECIPES, n=1, cutoff=0)
            raise RecipeError(
                f"there is no recipe {self.recipe!r}; the nearest is {near[0]}. The recipes are "
                f"{', '.join(RECIPES)}"
            )
        _ = self.text

    @property
    def text(self) -> str:
        """The name of the text, given or by default."""
        return text_for(self.data, self.model, bundled=is_bundled(self.model))
