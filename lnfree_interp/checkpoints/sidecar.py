"""`lnfree.json`: what an exported folder says beyond the weights, so that the export can be undone.

An LN-free export has one gain per channel where there were a gain, a constant and perhaps two
constants (q/k and v). The sidecar keeps the constants, with which `load(folder, form="sites")`
gives gains, biases and constants back one by one, and says how the model came about.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lnfree_interp.errors import CheckpointError

SIDECAR = "lnfree.json"
_VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """What the sidecar holds."""

    form: str
    """What was exported: `"live"`, `"partial"` (some norms frozen), `"sites"` (all frozen, each for
    itself), `"folded"`, `"frozen"`, `"rms"` or `"crms"`."""
    sigma: Mapping[str, float] = field(default_factory=dict)
    """The constant by which each norm divides, by site or norm."""
    sigma_first: Mapping[str, float] = field(default_factory=dict)
    """The same for the first token of a prompt, for norms where it is another one."""
    epsilon: float | None = None
    """What the norms added to the variance before they were removed."""
    recipe: Mapping[str, Any] | None = None
    """Fields of the removal recipe, if there was one."""
    errors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Measured errors by what was compared: absolute, relative, dtype."""
    source: str | None = None
    """What the model was made from."""
    weights: str | None = None
    """How its weights lost precision before they came here, such as "GGUF, quantised Q4_1,
    dequantised to float32"; None if that is not known."""
    made_by: str = ""
    """Name and version of the package that wrote it."""

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        content = {"version": _VERSION, **asdict(self)}
        (folder / SIDECAR).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_sidecar(folder: Path) -> Sidecar | None:
    """The sidecar of a folder, or None if it has none.

    Args:
        folder: Written by `export`.

    Returns:
        A `Sidecar`, or None.

    Raises:
        CheckpointError: if it cannot be read, is of another version, or states a constant that is
            not positive.

    Examples:
        >>> folder = lf.export(free, "exported", source="bundled")
        >>> lf.formats.read_sidecar(folder).source
        'bundled'
    """
    file = folder / SIDECAR
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("version")
        if version != _VERSION:
            raise CheckpointError(f"{file}: version {version}; this package reads {_VERSION}")
        sidecar = Sidecar(**content)
        numbers = {f"sigma of {name}": value for name, value in sidecar.sigma.items()}
        firsts = sidecar.sigma_first.items()
        numbers |= {f"sigma of first tokens at {name}": value for name, value in firsts}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error!s:.100}") from error
    if sidecar.epsilon is not None:
        numbers["epsilon"] = sidecar.epsilon
    if not isinstance(sidecar.weights, str | None):
        raise CheckpointError(f"{file}: weights is {sidecar.weights!r:.40}, not a text")
    for what, value in numbers.items():
        if not isinstance(value, int | float) or not 0 < value < 1e30:
            raise CheckpointError(f"{file}: {what} is {value!r:.40}, not a positive number")
    return sidecar
