"""Attention scores as bilinear sums over pairs of components, before the softmax.

    score[q, k] = sum_ij (c_i W_Q) . (c_j W_K) / sqrt(d_head)

over the parts c_i of the stream at the query and c_j at the key, biases among them. The softmax is
not additive, but its log-odds between two keys are: the normaliser cancels. So is the answer to
"what would the pattern be without this component", in closed form.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components.abstract_attention import AbstractAttention
from transformer_lens.hook_points import HookPoint

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.contributions import (
    Component,
    Contributions,
    Level,
    find_components,
)
from lnfree_interp.analysis.gaps import largest
from lnfree_interp.analysis.parts import Write, expand, transform
from lnfree_interp.analysis.questions import (
    Prompt,
    read_one_prompt,
    read_position,
    strings,
)
from lnfree_interp.analysis.reads import held, read, read_names
from lnfree_interp.analysis.writes import (
    Place,
    require_decomposable,
    require_level,
    write_names,
    writes,
)
from lnfree_interp.errors import DataError, InexactError, UnsupportedModelError
from lnfree_interp.models.running import run_and_keep
from lnfree_interp.numerics import MeasuredError, measure_error, sum_and_largest

_LARGEST = 2**28
"""Entries of a bilinear attribution; a gigabyte in float32."""


@dataclass(frozen=True, eq=False, repr=False)
class ScoreAttribution:
    """Attention scores of one query as a sum over pairs of components.

    Attributes:
        values: [query_component, key_component, key], in units of the score (pre-softmax).
        query_components: What each row is, at the query's position.
        key_components: What each column is, at the key's position.
        total: [key], the scores as the model computed them.
        log_pattern: [key], the logarithm of the attention pattern.
        head: As in `L2H5`.
        query: Its position.
        keys: Their positions.
        tokens: The prompt, as strings.
        level: How finely the stream was taken apart.
        frozen_scale: True if a live norm or a soft cap was held at the value it had.
        gap: Then, the largest difference between what a component at the query claims and what the
            scores lose without it, for the largest components, relative to the largest loss.
    """

    values: Float[Tensor, "query_component key_component key"]
    query_components: tuple[Component, ...]
    key_components: tuple[Component, ...]
    total: Float[Tensor, " key"]
    log_pattern: Float[Tensor, " key"]
    head: Component
    query: int
    keys: tuple[int, ...]
    tokens: tuple[str, ...]
    level: Level
    frozen_scale: bool = False
    gap: MeasuredError | None = None

    @cached_property
    def error(self) -> MeasuredError:
        """Sum over all pairs against the model's score, relative to the largest term."""
        found, largest = sum_and_largest(self.values.flatten(0, 1))
        scale = max(largest, self.total.abs().max().item())
        return replace(measure_error(found, self.total, scale), dtype=self.total.dtype)

    @property
    def certificate(self) -> Certificate:
        """The identity behind the sum."""
        name = f"sum over pairs of {self.level}s = attention scores of {self.head.label}"
        return Certificate(name, self.error)

    def verify(self, tolerance: float | None = None) -> "ScoreAttribution":
        """Return self if the pairs add up to the scores.

        Raises:
            InexactError: if they do not.
        """
        self.certificate.require(tolerance)
        return self

    def by_query(self) -> Contributions:
        """What each component at the query contributes to each score, whatever the key is."""
        return self._sum(1, self.query_components)

    def by_key(self) -> Contributions:
        """What each component at the key contributes to its score, whatever the query is."""
        return self._sum(0, self.key_components)

    def _sum(self, dim: int, components: tuple[Component, ...]) -> Contributions:
        of = (f"score of {self.head.label} from {self.query}",)
        return Contributions(
            self.values.sum(dim), components, self.total, self.level, of, (self.tokens,),
            self.frozen_scale, f"parts = attention scores of {self.head.label}",
            self.gap if dim else None,
        )  # fmt: skip

    def log_odds(self, key: int, other: int) -> Contributions:
        """The logarithm of how much more the head looks at one key than at another, by pairs' keys.

        log pattern[key] - log pattern[other], a sum over what is at the query times the difference
        of what is at the two keys.

        Args:
            key: Position.
            other: Position.

        Returns:
            Values [query_component]; its total comes from the pattern, behind the softmax.

        Raises:
            DataError: if a position is not among the keys.
        """
        a, b = (self.column(position) for position in (key, other))
        values = self.values[:, :, a].sum(1) - self.values[:, :, b].sum(1)
        return Contributions(
            values, self.query_components, self.log_pattern[a] - self.log_pattern[b], self.level,
            (f"log-odds of {key} over {other}, {self.head.label} from {self.query}",),
            (self.tokens,), self.frozen_scale, "parts = log-odds between two keys",
        )  # fmt: skip

    def __getitem__(self, pair: tuple[str | Component, str | Component]) -> Float[Tensor, " key"]:
        """The values of one pair, by the labels at the query and at the key.

        Raises:
            DataError: if there is none; it names the nearest.
        """
        query = find_components([pair[0]], self.query_components)[0]
        return self.values[query, find_components([pair[1]], self.key_components)[0]]

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.values.shape))
        held = f", held: gap {self.gap}" if self.gap is not None else ""
        return (
            f"ScoreAttribution({self.head.label} from {self.query}, {self.level} level, "
            f"values [{shape}], error {self.error}{held})"
        )

    def column(self, position: int) -> int:
        """The column of a key, by its position.

        Raises:
            DataError: if it is not among the keys.
        """
        position = read_position(position, len(self.tokens))
        if position not in self.keys:
            raise DataError(f"position {position} is not among the keys {list(self.keys)}")
        return self.keys.index(position)

    def top(self, key: int, k: int = 10) -> pd.DataFrame:
        """The pairs that matter most for one key: `query`, `key`, `value`.

        Raises:
            DataError: if the position is not among the keys.
        """
        if k < 1:
            raise DataError(f"the {k} largest are none")
        values = self.values[:, :, self.column(key)]
        rows = values.abs().flatten().topk(min(k, values.numel())).indices.tolist()
        width = values.shape[1]
        return pd.DataFrame(
            {
                "query": [self.query_components[row // width].label for row in rows],
                "key": [self.key_components[row % width].label for row in rows],
                "value": [values.flatten()[row].item() for row in rows],
            }
        )


@torch.no_grad()
def attribute_scores(
    model: HookedTransformer,
    prompt: Prompt,
    layer: int,
    head: int,
    query: int = -1,
    keys: Sequence[int] | Tensor | int | None = None,
    *,
    by: Level = "head",
    prepend_bos: bool | None = None,
    frozen_scale: bool = False,
) -> ScoreAttribution:
    """One head's attention scores from one query, by pairs of what query and key are made of.

    Args:
        model: LN-free, folded or with frozen norm sites.
        prompt: One prompt.
        layer: Of the head.
        head: Its index.
        query: Position.
        keys: Positions, or one. Default: all that the query sees.
        by: As in `attribute_logits`.
        prepend_bos: As in `attribute_logits`.
        frozen_scale: Hold live norms' scales and a soft cap's slope; `.gap` measures what that
            misses.

    Raises:
        InexactError: if a norm that the head reads through is live, or scores are capped, and
            `frozen_scale` is False.
        DataError: for a head or position that does not exist, or a result of more than a gigabyte.
        UnsupportedModelError: for a model whose stream has other parts, or with live norms on
            queries and keys.
    """
    require_head(model, layer, head)
    tokens = read_one_prompt(model, prompt, prepend_bos)
    n_pos = tokens.shape[1]
    query = read_position(query, n_pos)
    site = f"blocks.{layer}.ln1.qk"
    nonlinear = held(model, frozen_scale, [site])
    if model.cfg.attn_scores_soft_cap > 0:
        nonlinear.append("the soft cap on scores")
        if not frozen_scale:
            raise InexactError(
                "scores are capped, so no pair of components has a share of its own: pass "
                "frozen_scale=True to hold the slope of the cap"
            )
    scores_hook, pattern_hook = (
        f"blocks.{layer}.attn.hook_{x}" for x in ("attn_scores", "pattern")
    )
    more = [scores_hook, pattern_hook, Place(layer).hook, *query_key_hooks(model, layer)]
    cache = cache_input(model, tokens, layer, by, site, more)
    looks = _looks(cache[scores_hook][0, head, query])
    if not looks:
        raise DataError(f"position {query} sees no key: its scores are masked, or not numbers")
    seen = looks if keys is None else [read_position(key, n_pos) for key in _as_list(keys)]
    if not seen or not set(seen) <= set(looks):
        raise DataError(f"position {query} sees keys {looks[0]} to {looks[-1]}, not all of {seen}")
    parts = writes(model, cache, by, Place(layer), [query])
    n_parts = sum(len(part.components) for part in parts)
    if n_parts * max(n_parts, model.cfg.d_head) * len(seen) > _LARGEST:
        raise DataError(
            f"{n_parts} x {n_parts} pairs for {len(seen)} keys are too many: give fewer keys, or "
            "a coarser level"
        )
    q, q_components = projected(model, cache, layer, head, by, "Q", [query])
    k, k_components = projected(model, cache, layer, head, by, "K", seen)
    attn = model.blocks[layer].attn
    values = einsum(q[:, 0], k, "i d_head, j key d_head -> i j key") / attn.attn_scale
    total = cache[scores_hook][0, head, query, seen]
    if model.cfg.attn_scores_soft_cap > 0:  # hold the slope of what the cap let through
        q_whole, k_whole = queries_and_keys(model, cache, layer, head)
        uncapped = k_whole[seen] @ q_whole[query] / attn.attn_scale
        values = values * torch.where(uncapped == 0, 1.0, total / uncapped)
    gap = None
    if nonlinear:
        claims = values.sum(1)
        gap = _measured_gap(model, cache, claims, q_components, by, layer, head, query, seen)
    pattern = cache[pattern_hook][0, head, query, seen]
    return ScoreAttribution(
        values, q_components, k_components, total, pattern.log(), Component("head", layer, head),
        query, tuple(seen), tuple(strings(model, tokens[0].tolist())), by, bool(nonlinear), gap,
    )  # fmt: skip


def _measured_gap(
    model: HookedTransformer,
    cache: dict[str, Tensor],
    claims: Float[Tensor, "component key"],
    components: Sequence[Component],
    by: Level,
    layer: int,
    head: int,
    query: int,
    keys: Sequence[int],
) -> MeasuredError:
    """What the largest components at the query claim against what the scores lose without them."""
    stream = cache[Place(layer).hook]
    parts = writes(model, cache, by, Place(layer), [query])
    rows = largest(claims, components)
    vectors, _ = expand(parts, [components[row] for row in rows])
    original = run_attention(model, stream, layer)
    scores_hook, k_hook = (f"blocks.{layer}.attn.hook_{x}" for x in ("attn_scores", "k"))
    losses = []
    for vector in vectors:
        without = stream.clone()
        without[:, query] -= vector[:, 0]
        found = run_attention(model, without, layer, {k_hook: original[k_hook]})
        losses.append((original[scores_hook] - found[scores_hook])[0, head, query, keys])
    return measure_error(claims[rows], torch.stack(losses))


def run_attention(
    model: HookedTransformer,
    stream: Float[Tensor, "1 pos d_model"],
    layer: int,
    replaced: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Queries, keys, scores and patterns of a layer, by hook name, from the model's own block.

    Args:
        model: In any form.
        stream: What the block reads.
        layer: Of the block.
        replaced: Queries or keys to use instead.
    """
    found, replaced = {}, replaced or {}
    names = [f"blocks.{layer}.attn.hook_{x}" for x in ("q", "k", "attn_scores", "pattern")]

    def look(x: Tensor, hook: HookPoint) -> Tensor:
        found[hook.name] = replaced.get(hook.name, x)
        return found[hook.name]

    model.run_with_hooks(
        stream, start_at_layer=layer, stop_at_layer=layer + 1,
        fwd_hooks=[(lambda name: name in names, look)],
    )  # fmt: skip
    return found


def require_head(model: HookedTransformer, layer: int, head: int) -> None:
    """Refuse a head that the model does not have, or whose queries pass a norm of their own.

    Raises:
        DataError, UnsupportedModelError: as said, and as `require_decomposable`.
    """
    require_decomposable(model)
    cfg = model.cfg
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (layer, head))
    if not whole or not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
        raise DataError(
            f"there is no L{layer}H{head}: the model has {cfg.n_layers} layers of {cfg.n_heads} "
            "heads"
        )
    if cfg.use_qk_norm:
        raise UnsupportedModelError("norms on queries and keys: fold(model) merges frozen ones")


def cache_input(
    model: HookedTransformer,
    tokens: Int[Tensor, "1 pos"],
    layer: int,
    by: Level,
    site: str,
    more: Sequence[str] = (),
) -> dict[str, Tensor]:
    """What taking apart one layer's input needs, and more."""
    require_level(by)
    names = {*write_names(model, by, Place(layer)), *read_names(model, [site]), *more}
    return run_and_keep(model, tokens, names, layer + 1)[1]


def projected(
    model: HookedTransformer,
    cache: dict[str, Tensor],
    layer: int,
    head: int,
    by: Level,
    which: Literal["Q", "K"],
    positions: list[int],
) -> tuple[Float[Tensor, "component pos d_head"], tuple[Component, ...]]:
    """What each component, and each bias, adds to a head's queries or keys, rotated if they are."""
    attn = model.blocks[layer].attn
    W, b = getattr(attn, f"W_{which}")[head], getattr(attn, f"b_{which}")[head]
    norm = read(model, cache, f"blocks.{layer}.ln1.qk").at(positions)
    parts: Iterator[Write] = writes(model, cache, by, Place(layer), positions)
    values, components = transform(parts, norm.weights_back(W))
    scale = norm.scale if isinstance(norm.scale, float) else norm.scale[0]
    values = values[:, 0] / scale
    constants = [(Component("b_Q" if which == "Q" else "b_K"), b)]
    if norm.bias is not None:
        constants.insert(0, (Component("ln1.b", layer), norm.bias @ W))
    shape = (1, values.shape[1], values.shape[2])
    values = torch.cat([values, *(constant.expand(shape) for _, constant in constants)])
    if model.cfg.positional_embedding_type == "rotary":
        values = _rotated(attn, values, positions)
    return values, (*components, *(component for component, _ in constants))


def _rotated(
    attn: AbstractAttention, values: Float[Tensor, "component pos d_head"], positions: list[int]
) -> Float[Tensor, "component pos d_head"]:
    """Each at its position; those that lie side by side at once."""
    found, start = [], 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or positions[i] != positions[i - 1] + 1:
            run = values[:, start:i, None]
            found.append(attn.apply_rotary(run, past_kv_pos_offset=positions[start])[:, :, 0])
            start = i
    return torch.cat(found, dim=1)


def _as_list(keys: Sequence[int] | Tensor | int) -> list[int]:
    if isinstance(keys, Tensor):
        return torch.atleast_1d(keys).tolist()
    return [keys] if isinstance(keys, int) else list(keys)


def _looks(scores: Float[Tensor, " key"]) -> list[int]:
    """The keys that a query sees; the others have the score of a mask."""
    return (scores > torch.finfo(scores.dtype).min).nonzero()[:, 0].tolist()


def query_key_hooks(model: HookedTransformer, layer: int) -> tuple[str, str]:
    """Queries and keys as they meet."""
    rotary = model.cfg.positional_embedding_type == "rotary"
    q, k = (f"blocks.{layer}.attn.hook_{'rot_' if rotary else ''}{x}" for x in "qk")
    return q, k


def queries_and_keys(
    model: HookedTransformer, cache: dict[str, Tensor], layer: int, head: int
) -> tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]:
    """One head's, as the model computed them."""
    q, k = (cache[hook][0] for hook in query_key_hooks(model, layer))
    return q[:, head], k[:, head * k.shape[1] // model.cfg.n_heads]
