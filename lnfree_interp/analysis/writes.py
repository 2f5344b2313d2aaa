"""The residual stream taken apart: embeddings, heads, neurons and biases, as what writes to it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from einops import einsum
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Component, Level
from lnfree_interp.analysis.parts import (
    Constant,
    Dense,
    Heads,
    Neurons,
    Sources,
    Write,
    labels,
    source_labels,
)
from lnfree_interp.analysis.reads import Activations
from lnfree_interp.errors import DataError, UnsupportedModelError


@dataclass(frozen=True)
class Place:
    """A point of the stream: after so many blocks, and the next one's attention if `mid`."""

    layer: int
    mid: bool = False

    @classmethod
    def parse(cls, model: HookedTransformer, name: str) -> "Place":
        """From a hook name: `blocks.3.hook_resid_pre`, `_mid` or `_post`; short `resid_pre`s with a
        layer are TransformerLens' `get_act_name("resid_pre", 3)`.

        Raises:
            DataError: if the model has no such place.
        """
        match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)", str(name))
        if match is None or name not in model.hook_dict:
            last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
            raise DataError(
                f"{name!r} is no place in this model's residual stream; the last one is {last!r}"
            )
        layer = int(match[1])
        return cls(layer + (match[2] == "post"), match[2] == "mid")

    @classmethod
    def last(cls, model: HookedTransformer) -> "Place":
        """What the final norm reads."""
        return cls(model.cfg.n_layers)

    @property
    def hook(self) -> str:
        """Its name."""
        if self.mid:
            return f"blocks.{self.layer}.hook_resid_mid"
        if self.layer == 0:
            return "blocks.0.hook_resid_pre"
        return f"blocks.{self.layer - 1}.hook_resid_post"


def require_decomposable(model: HookedTransformer) -> None:
    """Refuse models whose stream is not the plain sum that `writes` assumes.

    Raises:
        UnsupportedModelError: for parts that would be missing from the sum.
    """
    cfg = model.cfg
    positions = cfg.positional_embedding_type
    unsupported = {
        "norms after the sublayers (fold(model) merges them once they are frozen)": (
            cfg.use_normalization_before_and_after
        ),
        "a norm after the embedding": cfg.post_embedding_ln,
        f"{positions!r} positions": positions not in ("standard", "rotary"),
        "mixtures of experts": cfg.num_experts is not None,
        "token types": getattr(cfg, "use_token_type_ids", False),
    }
    if found := [what for what, is_so in unsupported.items() if is_so]:
        raise UnsupportedModelError(f"cannot take apart a model with {', '.join(found)}")


def require_level(by: Level) -> None:
    """Refuse a level that there is not.

    Raises:
        DataError: with those that there are.
    """
    if by not in get_args(Level):
        raise DataError(f"by={by!r} is not one of {', '.join(get_args(Level))}")


_PER_BLOCK: dict[Level, tuple[str, str]] = {
    "layer": ("hook_attn_out", "hook_mlp_out"),
    "block": ("hook_attn_out", "hook_mlp_out"),
    "head": ("attn.hook_z", "hook_mlp_out"),
    "source": ("attn.hook_v", "hook_mlp_out"),
    "neuron": ("attn.hook_z", "mlp.hook_post"),
}


def write_names(model: HookedTransformer, level: Level, place: Place) -> list[str]:
    """The activations that `writes` needs."""
    attn, mlp = _PER_BLOCK[level]
    names = ["hook_embed"]
    if model.cfg.positional_embedding_type == "standard":
        names.append("hook_pos_embed")
    for layer in range(place.layer + place.mid):
        names.append(f"blocks.{layer}.{attn}")
        if level == "source":
            names.append(f"blocks.{layer}.attn.hook_pattern")
        if not model.cfg.attn_only and layer < place.layer:
            names.append(f"blocks.{layer}.{mlp}")
    return names


def writes(
    model: HookedTransformer,
    cache: Activations,
    level: Level,
    place: Place,
    positions: slice | list[int] = slice(None),
    repeat: int = 1,
    biases: bool = False,
) -> Iterator[Write]:
    """Everything that was written to the stream before a place, in the order of computation.

    Args:
        model: Whose weights to use.
        cache: The activations of `write_names`, whole.
        level: `"layer"`; `"block"`: attention and MLP of each layer. `"head"`: attention by head,
            its output bias b_O apart. `"source"`: each head by the token that it reads, its value
            bias b_V apart. `"neuron"`: as head, and MLPs by neuron, their bias b_out apart.
        place: Where to stop.
        positions: Which positions of the stream.
        repeat: Show the positions so many times over, if there is one, for as many directions.
        biases: Each head's b_V apart also by head and by neuron. Without, a head's part holds it,
            since attention weights sum to one.
    """

    def at(x: Tensor) -> Tensor:
        x = x[:, positions]
        return x if repeat == 1 else x.expand(x.shape[0], repeat, *x.shape[2:])

    embed = at(cache["hook_embed"])
    shape = (embed.shape[0], embed.shape[1])
    yield Dense((Component("embed"),), embed)
    if "hook_pos_embed" in cache:
        yield Dense((Component("pos_embed"),), at(cache["hook_pos_embed"]))

    for layer in range(place.layer + place.mid):
        block: Any = model.blocks[layer]
        prefix = f"blocks.{layer}"
        attn, has_mlp = block.attn, not model.cfg.attn_only and layer < place.layer
        if level == "layer":
            out = at(cache[f"{prefix}.hook_attn_out"])
            if has_mlp:
                out = out + at(cache[f"{prefix}.hook_mlp_out"])
            kind = "layer" if has_mlp or model.cfg.attn_only else "attn_out"
            yield Dense((Component(kind, layer),), out)
            continue
        if level == "block":
            yield Dense((Component("attn_out", layer),), at(cache[f"{prefix}.hook_attn_out"]))
        else:
            n_heads = attn.W_O.shape[0]
            heads = labels("head", layer, n_heads)
            split = biases or level == "source"
            if level == "source":
                v = cache[f"{prefix}.attn.hook_v"]
                v = v.repeat_interleave(n_heads // v.shape[2], dim=2) - attn.b_V
                pattern = cache[f"{prefix}.attn.hook_pattern"][:, :, positions]
                if repeat > 1:
                    pattern = pattern.expand(-1, -1, repeat, -1)
                sources = source_labels(layer, n_heads, v.shape[1])
                yield Sources(sources, pattern, v, attn.W_O)
            else:
                z = at(cache[f"{prefix}.attn.hook_z"])
                yield Heads(heads, z - attn.b_V if split else z, attn.W_O)
            if split:
                b_V = labels("b_V", layer, n_heads)
                yield Constant(b_V, einsum(attn.b_V, attn.W_O, "h k, h k d -> h d"), shape)
            yield Constant((Component("b_O", layer),), attn.b_O[None], shape)
        if not has_mlp:
            continue
        if level == "neuron":
            post = at(cache[f"{prefix}.mlp.hook_post"])
            neurons = labels("neuron", layer, post.shape[-1])
            yield Neurons(neurons, post, block.mlp.W_out)
            yield Constant((Component("b_out", layer),), block.mlp.b_out[None], shape)
        else:
            yield Dense((Component("mlp_out", layer),), at(cache[f"{prefix}.hook_mlp_out"]))
