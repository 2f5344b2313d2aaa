"""Attention scores as bilinear sums over pairs of components, before the softmax.

    score[q, k] = sum_ij (c_i W_Q) . (c_j W_K) / sqrt(d_head)

over the parts c_i of the stream at the query and c_j at the key, biases among them. The softmax is
not additive, but its log-odds between two keys are: the normaliser cancels. So is the answer to
"what would the pattern be without this component", in closed form.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components.abstract_attention import AbstractAttention
from transformer_lens.hook_points import HookPoint

from lnfree_interp.analysis.contributions import (
    Component,
    Level,
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
from lnfree_interp.analysis.scores import ScoreAttribution
from lnfree_interp.analysis.writes import (
    Place,
    require_decomposable,
    require_level,
    write_names,
    writes,
)
from lnfree_interp.errors import DataError, InexactError, UnsupportedModelError
from lnfree_interp.models.running import run_and_keep
from lnfree_interp.numerics import MeasuredError, measure_error

_LARGEST = 2**28
"""Entries of a bilinear attribution; a gigabyte in float32."""


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

    The head's biases are components too, `b_Q` and `b_K`, and its norm's, `2_ln1.b`, where it has
    one. The scores are those before the softmax, divided by the head's scale.

    Args:
        model: LN-free, folded or with frozen norm sites.
        prompt: One prompt.
        layer: Of the head.
        head: Its index.
        query: Position of the token that looks.
        keys: Positions that it looks at, or one. Default: all that the query sees.
        by: As in `attribute_logits`.
        prepend_bos: As in `attribute_logits`.
        frozen_scale: Hold live norms' scales and a soft cap's slope; `.gap` measures what that
            misses.

    Returns:
        Values [query_component, key_component, key], in units of the score.

    Raises:
        InexactError: if a norm that the head reads through is live, or scores are capped, and
            `frozen_scale` is False.
        DataError: for a head, level or position that does not exist, a key that the query does not
            see, more than one prompt, or a result of more than 2**28 values.
        UnsupportedModelError: for a model whose stream has other parts, or with norms on queries
            and keys.

    Source:
        The QK circuit, with the stream on both of its sides taken apart: Elhage et al. 2021,
        https://transformer-circuits.pub/2021/framework. The log-odds between two keys are ours:
        they are additive where the softmax is not.

    Examples:
        >>> scores = lf.attribute_scores(free, "for i in", layer=2, head=5).verify()
        >>> scores.values.shape
        torch.Size([19, 19, 4])
        >>> scores.by_key().values.shape
        torch.Size([19, 4])
        >>> _ = scores.log_odds(key=1, other=0).verify()
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
    found: dict[str, Tensor] = {}
    replaced = replaced or {}
    names = [f"blocks.{layer}.attn.hook_{x}" for x in ("q", "k", "attn_scores", "pattern")]

    def look(x: Tensor, hook: HookPoint) -> Tensor:
        name = hook.name or ""
        found[name] = replaced.get(name, x)
        return found[name]

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
    scale = norm.scale[0] if isinstance(norm.scale, Tensor) else norm.scale
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
