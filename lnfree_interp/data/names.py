"""Names of texts, and which model has a text by default. Imports nothing heavy."""

import os
from collections.abc import Iterable

from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.errors import DataError

STDLIB = "stdlib"
"""The name of the text that every machine has: the source of Python's standard library."""

ACCEPTED = (
    f"{STDLIB}, the source of Python's standard library; a .txt, .jsonl, .json, .parquet, .arrow "
    "or .csv file; a folder or a pattern of such files; a folder that save_to_disk wrote; or a "
    "data set on the hub"
)
"""What a text may be, for messages."""


def is_bundled(model: str | os.PathLike[str] | None) -> bool:
    """Whether a name stands for the model that ships with the package, as None does."""
    return model is None or os.path.realpath(model) == os.path.realpath(bundled_checkpoint())


def text_for(
    data: str | None, model: str | None, *, bundled: bool, also: Iterable[str] = ()
) -> str:
    """The text that was named, or the one that the bundled model was trained on.

    Args:
        data: The name of the text; None if none was given.
        model: The name of the model, for the message.
        bundled: Whether the model is the bundled one, or was made from it.
        also: Further names that a text may have here, for the message.

    Raises:
        DataError: if no text was named for any other model.
    """
    if data is not None:
        return data
    if bundled:
        return STDLIB
    choices = "; ".join([*also, ACCEPTED])
    raise DataError(
        f"no text was named for {model}. Only the model that ships with the package has a default; "
        f"for any other give --data (data= in Python): {choices}"
    )
