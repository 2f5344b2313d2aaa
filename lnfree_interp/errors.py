"""Every error that a caller can meet. All derive from `LnfreeError`.

The message is one line that says what was found and what to do about it; the command line prints
it and exits with 2.
"""


class LnfreeError(Exception):
    """Base class."""


class DataError(LnfreeError):
    """Input that cannot be used: text that cannot be read or packed, prompts and answers that the
    model cannot read, labels that name no component, figures of what is not there."""


class CheckpointError(LnfreeError):
    """A checkpoint that is missing, incomplete or broken."""


class UnsupportedModelError(LnfreeError):
    """A model that is not approximated because it cannot be represented faithfully."""


class InexactError(LnfreeError):
    """Two things that must be equal differ by more than the tolerance, or would if computed."""


class NormSiteError(LnfreeError):
    """A norm site that does not exist, or is not in the state that was asked for."""


class RecipeError(LnfreeError):
    """A removal recipe that does not fit itself, the model or the data."""


class OutputError(LnfreeError):
    """An output folder that already holds something, or cannot be written."""


class TrainingError(LnfreeError):
    """A run that cannot go on."""


class HeldWarning(UserWarning):
    """A sum that adds up while something that is not affine was held: it is not exact."""
