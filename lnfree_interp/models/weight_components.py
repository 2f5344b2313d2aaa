"""Components of weights: the parts of a model that a fine-tuning is asked about, each parameter in
one of them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.models.sites import stock_weights

_OF_A_HEAD = re.compile(r"blocks\.(\d+)\.attn\.(_?)(W_[QKVO]|b_[QKV])")


@dataclass(frozen=True)
class WeightComponent:
    """Some of a model's parameters, by name."""

    name: str
    """`L3H1` for a head, `L3KV0` for the keys and values that a group of heads shares; for all
    others the module's path, such as `blocks.3.mlp`, `blocks.3.ln2` and `embed`."""
    kind: str
    """`head`, `kv_head`, or the path inside of the block, such as `mlp`, `ln2` and `embed`."""
    layer: int | None
    """The block; None outside of blocks."""
    parts: tuple[tuple[str, int | None], ...]
    """The parameters, by their names in a stock model; with the first index of those that have a
    row for each head, None for a whole one."""

    def of(self, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Its parameters among a model's, by `stock_weights`."""
        for name, row in self.parts:
            yield weights[name] if row is None else weights[name][row]


def list_weight_components(model: HookedTransformer) -> tuple[WeightComponent, ...]:
    """The components of a model, in the order of its parameters.

    A head has its W_Q, W_K, W_V and W_O, and their biases; where heads share keys and values
    (grouped queries), those are a component for each group. b_O, which heads share, is one of its
    own. All other components are whole modules: `embed`, `blocks.0.mlp`, the norms.

    Args:
        model: A `HookedTransformer` in any form. The two halves of a split `ln1` share their
            parameters, which are those of `blocks.0.ln1`.

    Returns:
        The components. Each parameter is in one of them; of weights that are tied, `embed` and
            `unembed` have one each.

    Examples:
        >>> parts = lf.list_weight_components(model)
        >>> [part.name for part in parts if part.layer == 0]
        ['blocks.0.ln1', 'blocks.0.ln2', 'L0H0', ..., 'blocks.0.attn.b_O', 'blocks.0.mlp']
    """
    found: dict[str, tuple[str, int | None, list[tuple[str, int | None]]]] = {}
    for name, W in stock_weights(model).items():
        for component, kind, layer, row in _owners(name, W):
            found.setdefault(component, (kind, layer, []))[2].append((name, row))
    return tuple(
        WeightComponent(name, kind, layer, tuple(parts))
        for name, (kind, layer, parts) in found.items()
    )


def _owners(name: str, W: Tensor) -> Iterator[tuple[str, str, int | None, int | None]]:
    """The components that have a share in a parameter: name, kind, layer, and its row."""
    if match := _OF_A_HEAD.fullmatch(name):
        layer, shared = int(match[1]), bool(match[2])
        for row in range(len(W)):
            label = f"L{layer}{'KV' if shared else 'H'}{row}"
            yield label, "kv_head" if shared else "head", layer, row
        return
    path = name if name.endswith("attn.b_O") else name.rpartition(".")[0].removesuffix(".map")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", path):
        yield path, match[2], int(match[1]), None
    else:
        yield path, path, None, None
