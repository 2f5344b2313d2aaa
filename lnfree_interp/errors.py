"""Every error that a caller can meet. All derive from `LnfreeError`.

A message is one line that says what was found and what to do about it. The command line prints it
and exits with status 2.
"""


class LnfreeError(Exception):
    """The base class of all errors of this package."""


class DataError(LnfreeError):
    """Input that cannot be used: text that cannot be read or packed, prompts and answers that the
    model cannot read, labels that name no component, figures of data that a result lacks."""


class CheckpointError(LnfreeError):
    """A checkpoint that is missing, incomplete or broken."""


class UnsupportedModelError(LnfreeError):
    """A model that cannot be represented faithfully, and is not approximated."""


class InexactError(LnfreeError):
    """Two numbers that must be equal differ by more than the tolerance, or would if computed."""


class NormSiteError(LnfreeError):
    """A norm site that does not exist, or is not in the state that was asked for."""


class RecipeError(LnfreeError):
    """A removal recipe that contradicts itself, or does not fit the model or the data."""


class TooFewStepsError(RecipeError):
    """A recipe that does not fit into its steps."""

    def __init__(self, why: str, smallest: int):
        """An error that says how many steps would do.

        Args:
            why: What does not fit.
            smallest: The smallest number of steps that may do.
        """
        super().__init__(why, smallest)
        self.why, self.smallest = why, smallest

    def __str__(self) -> str:
        return f"{self.why}: give at least {self.smallest} steps"


class OutputError(LnfreeError):
    """An output file or folder that exists already, or cannot be written."""


class TrainingError(LnfreeError):
    """A training run that cannot continue."""


class PausedError(LnfreeError):
    """A training run that stopped where it was told to, with a checkpoint from which it continues.

    The command line exits with status 75 (try again), so that a script can call until it is done.
    """


class HeldWarning(UserWarning):
    """A sum that adds up only because something that is not affine was held, so it is not exact."""
