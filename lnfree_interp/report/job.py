"""What `lnfree report` is asked to do. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from lnfree_interp.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What the report is about."""

    source: Annotated[Positional[str], arg(metavar="RUN_OR_MODEL")]
    """A run's folder, a folder that lnfree demo wrote, or a model: hub id (ID@REVISION for a
    revision) or local folder."""
    original: str | None = None
    """The original. Default: what the run started from."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What the model is evaluated on."""

    data: str | None = None
    """The text: openwebtext-val, pile-10k or pile-10k-filtered; stdlib; local files; or a data set
    on the hub. Default: stdlib for the model that ships with the package and for runs that started
    from it; any other model needs it."""
    sequences: int = 64
    """How many sequences of text, of at most 256 tokens each."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """A logit to explain."""

    prompt: str | None = None
    """The prompt to explain. Default: prompts about Python source."""
    answer: str | None = None
    """The next token to explain; mind the space in front of it."""
    foil: str | None = None
    """The token that the answer is compared with."""


@dataclass(frozen=True, kw_only=True)
class ReportJob(ModelOptions, TextOptions, PromptOptions):
    """A report: the model and the text by their names, and a logit to explain."""

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.answer is None) or (self.foil and self.prompt is None):
            raise DataError("--prompt and --answer belong together, and --foil needs both")
