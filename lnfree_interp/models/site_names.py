"""The names of norm sites, without a model: what a name means, and sites in words."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

from lnfree_interp.errors import NormSiteError

SplitKind = Literal[
    "ln1.qk",
    "ln1.v",
    "attn.q_norm",
    "attn.k_norm",
    "attn.inner",
    "ln1_post",
    "ln2",
    "mlp.inner",
    "ln2_post",
    "ln_final",
]
"""The kinds of sites of a model with norm sites, in the order of computation."""

SiteKind = Literal["ln1", SplitKind]
"""These, and `ln1` where it is one norm."""


@dataclass(frozen=True)
class NormSite:
    """The name of a place where a norm acts."""

    kind: SiteKind
    """Which norm of the block, e.g. `"ln1.qk"`; or `"ln_final"`."""
    layer: int | None = None
    """Block index; None for `ln_final`."""

    @property
    def name(self) -> str:
        """The module path, e.g. `blocks.3.ln1.qk`."""
        return self.kind if self.layer is None else f"blocks.{self.layer}.{self.kind}"

    @property
    def order(self) -> tuple[float, int]:
        """Where it comes in the order of computation: a key to sort by."""
        layer = math.inf if self.layer is None else float(self.layer)
        return layer, get_args(SiteKind).index(self.kind)

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> "NormSite":
        """The site of that name.

        Raises:
            NormSiteError: if no model has such a site.
        """
        kind, layer = name, None
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            layer, kind = int(match[1]), match[2]
        if kind not in get_args(SiteKind) or (layer is None) != (kind == "ln_final"):
            raise NormSiteError(
                f"{name!r} is not the name of a norm site. Names are like 'blocks.0.ln1.qk', "
                "'blocks.0.ln1.v', 'blocks.0.ln2' and 'ln_final'"
            )
        return cls(cast(SiteKind, kind), layer)


def name_sites(names: Iterable[str]) -> str:
    """Sites in words, none left out: `ln1.v in blocks 0 to 29, blocks.3.ln2 and ln_final`.

    Args:
        names: Names of sites; what is none is taken over as it is.
    """
    layers: dict[str, list[int]] = {}
    for name in names:
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            layers.setdefault(match[2], []).append(int(match[1]))
        else:
            layers[name] = []
    found = []
    for kind, numbers in layers.items():
        runs: list[list[int]] = []
        for number in sorted(numbers):
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        found += [kind] * (not numbers)
        for run in runs:
            one = f"blocks.{run[0]}.{kind}"
            found.append(one if len(run) == 1 else f"{kind} in blocks {run[0]} to {run[-1]}")
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


SCALERS = ("attn.head_scale", "attn.chunk_scale", "resid_scale")
"""The places of a block where factors act that are learned, by TransformerLens' kind of path."""


def whole_norm(name: str) -> str:
    """The norm that a site is part of in a stock model: `blocks.0.ln1` for both of its halves."""
    return name.rpartition(".")[0] if name.endswith((".ln1.qk", ".ln1.v")) else name


def sites_in(norm: str) -> tuple[str, ...]:
    """The sites that a norm of a stock model holds: the halves of `ln1`, the values' last."""
    return (f"{norm}.qk", f"{norm}.v") if norm.endswith(".ln1") else (norm,)


def stock_name(parameter: str) -> str:
    """What a parameter of a model with norm sites is called in a stock model."""
    module, _, leaf = parameter.rpartition(".")
    norm = module.removesuffix(".map")
    return f"{whole_norm(norm)}{module[len(norm) :]}.{leaf}"
