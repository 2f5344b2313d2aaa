"""The options of `lnfree freeze`. The module imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from lnfree_interp.data.names import is_bundled, text_for
from lnfree_interp.evaluation import job as evaluation


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
class TextOptions(evaluation.TextOptions):
    """What constants are measured on, and the price."""

    sequences: int | None = 128
    """How many sequences of text. The price is measured on the last quarter, which nothing else
    sees."""


@dataclass(frozen=True, kw_only=True)
class FreezingOptions:
    """How the norms are frozen."""

    steps: int = 0
    """Steps of training after freezing, by distillation from the given model; 0: none."""
    batch: int = 2
    """Sequences of text per step."""
    lr: float = 5e-5
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
