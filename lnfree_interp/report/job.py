"""What `lnfree report` is asked to do. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from lnfree_interp.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """A report: the model and the text by their names, and a logit to explain."""

    source: Annotated[Positional[str], arg(metavar="RUN_OR_MODEL")]
    """A run's folder, a folder that lnfree demo wrote, or a model: hub id (ID@REVISION for a
    revision) or local folder."""
    original: str | None = None
    """The original. Default: what the run started from."""
    data: str = "stdlib"
    """The text to evaluate on: openwebtext-val, pile-10k or pile-10k-filtered; stdlib; local files;
    or a data set on the hub."""
    sequences: int = 64
    """How many sequences of text, of at most 256 tokens each."""
    prompt: str | None = None
    """The prompt to explain. Default: prompts about Python source."""
    answer: str | None = None
    """The next token to explain; mind the space in front of it."""
    foil: str | None = None
    """The token that the answer is compared with."""

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.answer is None) or (self.foil and self.prompt is None):
            raise DataError("--prompt and --answer belong together, and --foil needs both")
