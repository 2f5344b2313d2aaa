"""The options of `lnfree freeze`. The module imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from lnfree_interp.data.names import is_bundled, text_for


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and what is to be exact on it."""

    model: Annotated[Positional[str | None], arg(metavar="[MODEL]")] = None
    """Hub id, local Hugging Face folder or GGUF file. Default: the small GPT-2 that ships with the
    package."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    question: Annotated[tuple[str, ...], arg(metavar="QUESTION...")] = ("logits",)
    """What is to be exact: logits, direct logit attribution; L23H3, the scores of that head;
    L5N310, the input of that neuron; paths or flow, a logit's paths or flow graph; or norm sites by
    name, such as ln_final or blocks.23.ln1.qk."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What constants are measured on, and the price."""

    data: str | None = None
    """The text: stdlib, the source of Python's standard library; a .txt, .jsonl, .json, .parquet,
    .arrow or .csv file; a folder or a pattern of such files; a folder that save_to_disk wrote; or a
    data set on the hub. Default: stdlib for the model that ships with the package; any other model
    needs it."""
    sequences: int = 128
    """How many sequences of text. The price is measured on the last quarter, which nothing else
    sees."""
    sequence_length: int | None = None
    """Tokens per sequence. Default: the model's context, up to 256."""
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
class FreezingOptions:
    """How the norms are frozen."""

    steps: int = 0
    """Steps of training after freezing, by distillation from the given model; 0: none."""
    batch: int = 8
    """Sequences of text per step."""
    lr: float = 2e-5
    """Peak learning rate."""
    one_constant: bool = False
    """Divide the first token of a prompt by the constant of all others. Default: by its own."""


@dataclass(frozen=True, kw_only=True)
class FreezeJob(ModelOptions, TextOptions, FreezingOptions):
    """A model, what is to be exact on it, and a text, by their names.

    Raises:
        DataError: if no text is named for a model other than the bundled one.
    """

    def __post_init__(self) -> None:
        _ = self.text

    @property
    def text(self) -> str:
        """The name of the text, given or by default."""
        return text_for(self.data, self.model, bundled=is_bundled(self.model))
