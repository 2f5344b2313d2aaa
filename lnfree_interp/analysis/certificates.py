"""Certificates: the identity behind a result, and the error with which it holds."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from lnfree_interp.numerics import MeasuredError


@dataclass(frozen=True)
class Certificate:
    """An identity that was checked."""

    identity: str
    """The identity in words: what equals what."""
    error: MeasuredError
    """The largest absolute and relative difference, and the dtype that sets the tolerance."""
    held: tuple[str, ...] = ()
    """What is not affine and was held for it; empty for an exact result."""
    gap: MeasuredError | None = None
    """What holding misses: claims against measured effects."""

    @property
    def holds(self) -> bool:
        """Whether rounding in the dtype explains the relative error."""
        return self.error.relative <= self.error.tolerance

    def require(self, tolerance: float | None = None) -> "Certificate":
        """Return self if the identity holds.

        Args:
            tolerance: Largest relative error allowed. Default: what rounding in the error's dtype
                explains, 1e-5 in float32 and 1e-10 in float64.

        Raises:
            InexactError: if the identity does not hold.
        """
        self.error.require(self.identity + describe_held(self.held, self.gap), tolerance)
        return self

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        dtype = str(self.error.dtype).removeprefix("torch.")
        held = describe_held(self.held, self.gap)
        return f"{verdict}{held}: {self.identity}; {self.error}, {dtype}"


def describe_held(held: tuple[str, ...], gap: MeasuredError | None) -> str:
    """What was held and what that misses, as the end of a sentence; empty if nothing was held."""
    if not held:
        return ""
    named = held[0] if len(held) == 1 else f"{held[0]} and {len(held) - 1} more"
    missed = "" if gap is None else f", which misses {gap.relative:.2g} of the largest effect"
    return f" with {named} held{missed}"


def certificate_table(certificates: Iterable[Certificate]) -> pd.DataFrame:
    """Several certificates as a table, to report next to the results that they belong to.

    Args:
        certificates: The `certificate` of each result.

    Returns:
        One row per certificate with the columns `identity`, `absolute` (in the unit of what was
        compared), `relative`, `dtype`, `tolerance` (relative), `holds`, `held` (empty for an exact
        result) and `gap` (what holding misses, relative).

    Source:
        Ours: every decomposition states the identity behind it and the error of that identity.

    Examples:
        >>> dla = lf.attribute_logits(free, "for i in", " range")
        >>> lens = lf.logit_lens(free, tokens)
        >>> lf.certificate_table([dla.certificate, lens.certificate])["holds"].tolist()
        [True, True]
    """
    return pd.DataFrame(
        [
            {
                "identity": certificate.identity,
                "absolute": certificate.error.absolute,
                "relative": certificate.error.relative,
                "dtype": str(certificate.error.dtype).removeprefix("torch."),
                "tolerance": certificate.error.tolerance,
                "holds": certificate.holds,
                "held": ", ".join(certificate.held),
                "gap": None if certificate.gap is None else certificate.gap.relative,
            }
            for certificate in certificates
        ]
    )
