"""What an analysis claims, and how far it is from true."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from lnfree_interp.numerics import MeasuredError


@dataclass(frozen=True)
class Certificate:
    """An identity, checked."""

    identity: str
    """What equals what."""
    error: MeasuredError
    """Largest absolute and relative difference, and the dtype it must be judged by."""

    @property
    def holds(self) -> bool:
        """Whether the relative error is one that rounding in the dtype explains."""
        return self.error.relative <= self.error.tolerance

    def require(self, tolerance: float | None = None) -> "Certificate":
        """Return self if the identity holds.

        Args:
            tolerance: Largest relative error allowed. Default: by dtype.

        Raises:
            InexactError: if it does not.
        """
        self.error.require(self.identity, tolerance)
        return self

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        dtype = str(self.error.dtype).removeprefix("torch.")
        return f"{verdict}: {self.identity}; {self.error}, {dtype}"


def certificate_table(certificates: Iterable[Certificate]) -> pd.DataFrame:
    """One row per certificate: identity, absolute and relative error, dtype, tolerance, verdict."""
    return pd.DataFrame(
        [
            {
                "identity": certificate.identity,
                "absolute": certificate.error.absolute,
                "relative": certificate.error.relative,
                "dtype": str(certificate.error.dtype).removeprefix("torch."),
                "tolerance": certificate.error.tolerance,
                "holds": certificate.holds,
            }
            for certificate in certificates
        ]
    )
