"""The residual stream taken apart, as what writes to it: activations times weights.

The stream is a sum of embeddings, heads, neurons and biases. A part is never expanded to d_model:
a direction is carried back through the weights and meets the activations there, and a matrix that
reads the stream is multiplied with the weights first.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Component, ComponentKind, Level, find_components
from lnfree_interp.analysis.reads import Activations
from lnfree_interp.errors import DataError, UnsupportedModelError

Direction = Float[Tensor, "batch pos d_model"]
Values = Float[Tensor, "batch pos part"]
Vectors = Float[Tensor, "batch pos part d_model"]


@dataclass(frozen=True, eq=False)
class Dense:
    """One part that is there in full."""

    components: tuple[Component, ...]
    x: Float[Tensor, "batch pos d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        torch.linalg.vecdot(self.x, direction, out=out[..., 0])

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        return (self.x @ W)[:, :, None]

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        return self.x[:, :, None].expand(-1, -1, len(rows), -1)


@dataclass(frozen=True, eq=False)
class Constant:
    """Biases, the same for every token."""

    components: tuple[Component, ...]
    biases: Float[Tensor, "part d_model"]
    shape: tuple[int, int]
    """Batch and positions."""

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        out.copy_(direction @ self.biases.T)

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        parts = self.biases @ W
        return parts.expand(*self.shape, *parts.shape)

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        return self.biases[rows].expand(*self.shape, -1, -1)


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads, or what they add before their biases."""

    components: tuple[Component, ...]
    z: Float[Tensor, "batch pos head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        torch.linalg.vecdot(self.z, _onto_z(direction, self.W_O), out=out)

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        return einsum(
            self.z, self.W_O @ W, "batch pos head d_head, head d_head m -> batch pos head m"
        )

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        return einsum(self.z[:, :, rows], self.W_O[rows], "b p h k, h k d -> b p h d")


@dataclass(frozen=True, eq=False)
class Sources:
    """Each head split by the token that it reads; head by head, then token by token."""

    components: tuple[Component, ...]
    pattern: Float[Tensor, "batch head pos source"]
    v: Float[Tensor, "batch source head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        moved = einsum(
            _onto_z(direction, self.W_O), self.v,
            "batch pos head d_head, batch source head d_head -> batch head pos source",
        ).mul_(self.pattern)  # fmt: skip
        out.unflatten(-1, (self.v.shape[2], -1)).copy_(moved.transpose(1, 2))

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        read = einsum(
            self.v, self.W_O @ W, "batch source head d_head, head d_head m -> batch source head m"
        )
        moved = einsum(
            self.pattern,
            read,
            "batch head pos source, batch source head m -> batch pos head source m",
        )
        return moved.flatten(2, 3)

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        n_sources = self.v.shape[1]
        found = []
        for row in rows:
            head, source = divmod(row, n_sources)
            whole = self.v[:, source, head] @ self.W_O[head]
            found.append(self.pattern[:, head, :, source, None] * whole[:, None])
        return torch.stack(found, dim=2)


@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons of an MLP."""

    components: tuple[Component, ...]
    post: Float[Tensor, "batch pos neuron"]
    W_out: Float[Tensor, "neuron d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        torch.mul(direction @ self.W_out.T, self.post, out=out)

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        return self.post[..., None] * (self.W_out @ W)

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        return self.post[..., rows, None] * self.W_out[rows]


@lru_cache(maxsize=256)
def labels(
    kind: ComponentKind, layer: int, n: int, sources: int | None = None
) -> tuple[Component, ...]:
    """Heads or neurons of a layer, by source token too; made once, since there are many."""
    if sources is None:
        return tuple(Component(kind, layer, index) for index in range(n))
    return tuple(Component(kind, layer, i, pos) for i in range(n) for pos in range(sources))


Write = Dense | Constant | Heads | Sources | Neurons
"""A group of parts that one set of weights writes."""


def _onto_z(
    direction: Float[Tensor, "batch pos d_model"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "batch pos head d_head"]:
    return (direction @ W_O.flatten(0, 1).T).unflatten(-1, W_O.shape[:2])


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
        match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)", name)
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
    positions: slice = slice(None),
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
        block, prefix = model.blocks[layer], f"blocks.{layer}"
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
                sources = labels("head", layer, n_heads, v.shape[1])
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


def project(
    parts: Iterable[Write],
    direction: Float[Tensor, "batch pos d_model"],
    constants: Sequence[tuple[Component, Float[Tensor, "batch pos"]]] = (),
) -> tuple[Float[Tensor, "component batch pos"], tuple[Component, ...]]:
    """Every part, projected onto a direction per position.

    Args:
        parts: Of the stream.
        direction: [batch, pos, d_model].
        constants: What else belongs to the sum.

    Returns:
        Values [component, batch, pos], a view of memory that has the components last, and what
        each row is.
    """
    parts = list(parts)
    components = [component for part in parts for component in part.components]
    values = direction.new_empty(*direction.shape[:-1], len(components) + len(constants))
    start = 0
    for part in parts:
        end = start + len(part.components)
        part.onto(direction, values[..., start:end])
        start = end
    for column, (component, value) in enumerate(constants, start):
        values[..., column] = value
        components.append(component)
    return values.movedim(-1, 0), tuple(components)


def expand(
    parts: Iterable[Write], wanted: Sequence[str | Component] | None = None
) -> tuple[Float[Tensor, "component batch pos d_model"], tuple[Component, ...]]:
    """Parts in full, d_model and all.

    Args:
        parts: Of the stream.
        wanted: Only these, in the order of computation. Default: all.

    Raises:
        DataError: for a component that is not among them; it names the nearest.
    """
    parts = list(parts)
    components = [component for part in parts for component in part.components]
    chosen = range(len(components)) if wanted is None else find_components(wanted, components)
    chosen, start, vectors = sorted(set(chosen)), 0, []
    for part in parts:
        rows = [i - start for i in chosen if start <= i < start + len(part.components)]
        if rows:
            vectors.append(part.vectors(rows))
        start += len(part.components)
    return torch.cat(vectors, dim=2).movedim(2, 0), tuple(components[i] for i in chosen)


def transform(
    parts: Iterable[Write], W: Float[Tensor, "d_model m"]
) -> tuple[Float[Tensor, "component batch pos m"], tuple[Component, ...]]:
    """Every part, through a matrix that reads the stream."""
    values, components = [], []
    for part in parts:
        values.append(part.through(W))
        components.extend(part.components)
    return torch.cat(values, dim=2).movedim(2, 0), tuple(components)
