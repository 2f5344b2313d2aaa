"""A head's attention pattern without some of what it reads, in closed form.

The parts of queries and keys are known, so taking one away gives the new scores and, by the
softmax, the new pattern: no second run of the model. The certificate makes that run all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.ablation import by_ablation
from lnfree_interp.analysis.attention import (
    cache_input,
    projected,
    queries_and_keys,
    query_key_hooks,
    require_head,
    run_attention,
)
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.contributions import Component, Level, find_components
from lnfree_interp.analysis.questions import Prompt, read_one_prompt, strings
from lnfree_interp.analysis.reads import held
from lnfree_interp.analysis.writes import Place
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import measure_error

Side = Literal["both", "query", "key"]


@dataclass(frozen=True, eq=False, repr=False)
class CounterfactualPattern:
    """A head's attention pattern without some components of what it reads.

    Attributes:
        pattern: [query, key], attention weights without them, in closed form.
        scores: [query, key], the same before the softmax; -inf where a query does not look.
        original: [query, key], the model's own.
        certificate: The closed form against a run of the model in which the components were
            subtracted from what the head reads.
        without: Their labels.
        head: As in `L2H5`.
        tokens: The prompt, as strings.
    """

    pattern: Float[Tensor, "query key"]
    scores: Float[Tensor, "query key"]
    original: Float[Tensor, "query key"]
    certificate: Certificate
    without: tuple[str, ...]
    head: Component
    tokens: tuple[str, ...]

    def __repr__(self) -> str:
        moved = (self.pattern - self.original).abs().max().item()
        return (
            f"CounterfactualPattern({self.head.label} without {', '.join(self.without)}: weights "
            f"move by up to {moved:.3f}; {self.certificate})"
        )

    def verify(self, tolerance: float | None = None) -> "CounterfactualPattern":
        """Return self if the closed form equals the patched run.

        Args:
            tolerance: As in `Contributions.verify`.

        Raises:
            InexactError: if it does not.
        """
        self.certificate.require(tolerance)
        return self


@torch.no_grad()
def counterfactual_pattern(
    model: HookedTransformer,
    prompt: Prompt,
    layer: int,
    head: int,
    without: str | Component | Sequence[str | Component],
    *,
    side: Side = "both",
    by: Level = "head",
    prepend_bos: bool | None = None,
    frozen_scale: bool = False,
) -> CounterfactualPattern:
    """The pattern that a head would have if components were missing from what it reads.

    Only what this head reads changes: the components stay in the stream for all others. A soft cap
    on scores is applied, not held.

    Args:
        model: As in `attribute_scores`.
        prompt: One prompt.
        layer: Of the head.
        head: Its index.
        without: Labels of components of the level, `"L0H3"`, `"pos_embed"`, `"0_mlp_out"`.
        side: Missing from queries, from keys, or from both.
        by: As in `attribute_logits`.
        prepend_bos: As in `attribute_logits`.
        frozen_scale: Hold live norms' scales. The certificate then shows by how much the answer
            differs from a run in which the norm sees that something is missing.

    Returns:
        Patterns with and without the components, each [query, key], in attention weights.

    Raises:
        DataError: for a component that does not exist at that level before this layer; the nearest
            are named. For a head, level or side that does not exist, no component, a bias that is
            no part of the stream, or more than one prompt.
        InexactError: if the norm that queries and keys read through is live and `frozen_scale` is
            False.
        UnsupportedModelError: as `attribute_scores`.

    Source:
        Ours: components are subtracted in the QK circuit (Elhage et al. 2021,
        https://transformer-circuits.pub/2021/framework), and the softmax is taken again.

    Examples:
        >>> without = lf.counterfactual_pattern(free, "for i in", 2, 5, without="L0H3").verify()
        >>> without.pattern.shape
        torch.Size([4, 4])
        >>> without.head.label, without.without
        ('L2H5', ('L0H3',))
    """
    require_head(model, layer, head)
    tokens = read_one_prompt(model, prompt, prepend_bos)
    if side not in get_args(Side):
        raise DataError(f"side={side!r} is not one of {', '.join(get_args(Side))}")
    site, prefix = f"blocks.{layer}.ln1.qk", f"blocks.{layer}.attn"
    held(model, frozen_scale, [site])
    more = [f"{prefix}.hook_attn_scores", f"{prefix}.hook_pattern", Place(layer).hook]
    more += query_key_hooks(model, layer)
    cache = cache_input(model, tokens, layer, by, site, more)
    given = [without] if isinstance(without, str | Component) else list(without)
    if not given:
        raise DataError("name at least one component to take away")
    wanted = [one if isinstance(one, str) else one.label for one in given]
    if biases := [one for one in wanted if one in ("b_Q", "b_K") or one.endswith("ln1.b")]:
        raise DataError(f"{biases[0]} is no part of the stream: it cannot be missing from it")
    attn = model.blocks[layer].attn
    q, k = queries_and_keys(model, cache, layer, head)
    everywhere = list(range(tokens.shape[1]))
    parts, components = projected(model, cache, layer, head, by, "Q", everywhere)
    rows = find_components(wanted, components)
    if side != "key":
        q = q - parts[rows].sum(0)
    if side != "query":
        q_and_k = projected(model, cache, layer, head, by, "K", everywhere)
        k = k - q_and_k[0][find_components(wanted, q_and_k[1])].sum(0)
    scores = q @ k.T / attn.attn_scale
    cap = model.cfg.attn_scores_soft_cap
    scores = cap * torch.tanh(scores / cap) if cap > 0 else scores
    looks = cache[f"{prefix}.hook_attn_scores"][0, head] > torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~looks, -torch.inf)
    pattern = scores.softmax(-1)
    patched = _patched_pattern(model, tokens, cache, layer, head, wanted, side)
    name = f"closed form = patched pattern of {Component('head', layer, head).label}"
    return CounterfactualPattern(
        pattern, scores, cache[f"{prefix}.hook_pattern"][0, head],
        Certificate(name, measure_error(pattern, patched)),
        tuple(wanted),
        Component("head", layer, head), tuple(strings(model, tokens[0].tolist())),
    )  # fmt: skip


def _patched_pattern(
    model: HookedTransformer,
    tokens: Int[Tensor, "1 pos"],
    cache: dict[str, Tensor],
    layer: int,
    head: int,
    without: Sequence[str],
    side: Side,
) -> Float[Tensor, "query key"]:
    """The same from the model's own block, run on a stream from which the components are gone."""
    resid = cache[Place(layer).hook]
    gone = torch.stack([by_ablation(model, tokens, Component.parse(x)) for x in without]).sum(0)
    kept = {}
    if side != "both":
        other = f"blocks.{layer}.attn.hook_{'k' if side == 'query' else 'q'}"
        kept = {other: run_attention(model, resid, layer)[other]}
    patched = run_attention(model, resid - gone, layer, kept)
    return patched[f"blocks.{layer}.attn.hook_pattern"][0, head]
