"""What the analyses know about a model: weights, how its sublayers read the stream, how it runs.

A `View` describes one model in terms of the transformer, whatever library implements it. Its two
adapters, `hooked` and `bridge`, are the only files that know a generation of TransformerLens.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from lnfree_interp.analysis.stream import First, Place, Read, Stream
from lnfree_interp.analysis.sublayers import MLP, Attention
from lnfree_interp.errors import DataError, InexactError, UnsupportedModelError
from lnfree_interp.models.running import Edit
from lnfree_interp.models.weighing import Weighing

Side = Literal["query", "key"]
"""Of an attention score."""
Model = nn.Module
"""A `HookedTransformer`, or a `TransformerBridge` of TransformerLens 4."""
LOGIT_CAP, SCORE_CAP = "the soft cap on the logits", "the soft cap on the scores"
_SITE_COSTS = "_lnfree_site_costs"
"""Attribute of a model: its own id, and what freezing a site alone costs, where it was measured.
Plain values, so that a stock model stays one that needs no class of this package; a copy of the
model, which may be trained, has another id."""

_noted: ContextVar[dict[str, None] | None] = ContextVar("norms that are read", default=None)


def remember_site_costs(model: Any, costs: Mapping[str, float]) -> None:
    """What freezing a site alone costs, by site: refusals on this very model say it."""
    setattr(model, _SITE_COSTS, (id(model), dict(costs)))


@contextmanager
def noting_reads() -> Iterator[dict[str, None]]:
    """Note what questions read through, norms and soft caps, and answer as if all were affine.

    Yields:
        What is noted, in the order in which it was asked for.
    """
    noted: dict[str, None] = {}
    before = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(before)


def noting() -> bool:
    """Whether reads are noted now, so that no number counts."""
    return _noted.get() is not None


class View(ABC):
    """One model in terms of the transformer.

    Attributes:
        model: The model itself.
        cfg: Its config, with TransformerLens' names.
    """

    def __init__(self, model: Any):
        self.model, self.cfg = model, model.cfg
        self._weights: dict[tuple[str, int], Any] = {}
        self.require_plain_sum()

    # Architecture

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self.cfg.n_layers

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same stream."""
        return bool(self.cfg.parallel_attn_mlp)

    @property
    def gated(self) -> bool:
        """Whether MLPs have gates."""
        return bool(self.cfg.gated_mlp)

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated by position."""
        return self.cfg.positional_embedding_type == "rotary"

    @property
    def has_positions(self) -> bool:
        """Whether positions are added to the stream."""
        return self.cfg.positional_embedding_type == "standard"

    @property
    def has_mlps(self) -> bool:
        """Whether blocks have MLPs."""
        return not self.cfg.attn_only

    @property
    def score_cap(self) -> float:
        """What attention scores are capped at; 0 for none."""
        return max(self.cfg.attn_scores_soft_cap or 0.0, 0.0)

    @property
    def logit_cap(self) -> float:
        """What logits are capped at; 0 for none."""
        return max(self.cfg.output_logits_soft_cap or 0.0, 0.0)

    @property
    def last(self) -> Place:
        """The place that the final norm reads."""
        return Place(self.n_layers)

    def place(self, name: Any) -> Place:
        """A place by hook name: `blocks.3.hook_resid_pre`, `_mid` or `_post`; or a given place.

        Raises:
            DataError: if the model has no such place.
        """
        if name is None:
            return self.last
        found = name if isinstance(name, Place) else None
        if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)", str(name)):
            found = Place(int(match[1]) + (match[2] == "post"), match[2] == "mid")
        ends = self.n_layers - bool(found and found.mid)
        no_mid = self.parallel or not self.has_mlps
        if found is None or not 0 <= found.layer <= ends or (found.mid and no_mid):
            raise DataError(
                f"{name!r} is no place in this model's residual stream: give a hook name such as "
                f"'blocks.0.hook_resid_pre'; the last place is {self.last.hook!r}"
            )
        return found

    def mlp_place(self, layer: int) -> Place:
        """The place that a layer's MLP reads: behind the attention, or before it if parallel."""
        return Place(layer, mid=not self.parallel)

    def attn_written(self, layer: int) -> Place:
        """The first place where the stream includes what a layer's attention writes."""
        return Place(layer + 1) if self.parallel or not self.has_mlps else Place(layer, mid=True)

    @property
    def explains_scores(self) -> bool:
        """Whether it is known how queries and keys come from the stream."""
        return True

    def weighing(self, layer: int) -> Weighing:
        """How a layer weighs tokens."""
        return "softmax"

    def require_softmax(self, layer: int) -> None:
        """Refuse a question about scores of a layer whose attention weights are no softmax.

        Raises:
            UnsupportedModelError: if they are not.
        """
        if self.weighing(layer) != "softmax":
            raise UnsupportedModelError(
                f"attention in block {layer} is linear: its weights are products of features of "
                "queries and keys, not of queries and keys, so that no part of the stream has a "
                "share of a score. Ask what heads read, with by='source', or about another block"
            )

    def qk_norm(self, layer: int, side: Side) -> str | None:
        """The norm that a layer's queries or keys pass behind their projection, if there is one.

        Raises:
            UnsupportedModelError: if there is one, and how it reads is not known here.
        """
        if not getattr(self.cfg, "use_qk_norm", False):
            return None
        return f"blocks.{layer}.attn.{'q' if side == 'query' else 'k'}_norm"

    @property
    def inner_sites(self) -> list[str]:
        """The norms inside and behind sublayers, which all parts of the stream come through."""
        return []

    @abstractmethod
    def require_plain_sum(self) -> None:
        """Raise an error if the model's stream is not the plain sum of the parts known here.

        Raises:
            UnsupportedModelError: if it is not; the message names what the sum would miss.
        """

    # Weights

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return self.model.W_E.detach()

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The positional embedding."""
        return self.model.W_pos.detach()

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return self.model.W_U.detach()

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias."""
        return self.model.b_U.detach()

    def attention(self, layer: int) -> Attention:
        """The weights of a layer's attention."""
        return self._once("attention", layer, self._attention)

    def mlp(self, layer: int) -> MLP:
        """The weights of a layer's MLP."""
        return self._once("mlp", layer, self._mlp)

    def _once(self, kind: str, layer: int, make: Any) -> Any:
        if (kind, layer) not in self._weights:
            self._weights[kind, layer] = make(layer)
        return self._weights[kind, layer]

    @abstractmethod
    def _attention(self, layer: int) -> Attention: ...

    @abstractmethod
    def _mlp(self, layer: int) -> MLP: ...

    @abstractmethod
    def rotations(self, layer: int, n_pos: int) -> Float[Tensor, "pos d_head d_head"]:
        """For each position, the matrix that rotates its queries and keys."""

    # How the model reads the stream

    @abstractmethod
    def is_affine(self, site: str) -> bool:
        """Whether the norm at a site divides by constants, or there is none.

        Raises:
            UnsupportedModelError: if there is something else than a norm at the site.
        """

    def bends(self, site: str) -> bool:
        """Whether the norm at a site is a live curve of each entry: no token has a scale there."""
        return False

    @abstractmethod
    def scale_hook(self, site: str) -> str | None:
        """The hook name of a scale that differs between tokens; None where there is one for all.

        Raises:
            UnsupportedModelError: if there is something else than a norm at the site.
        """

    @abstractmethod
    def read(self, site: str, scale: Float[Tensor, "*batch one"] | None) -> Read:
        """How the norm at a site reads the stream.

        Args:
            site: The norm site: `ln_final`, `blocks.0.ln1.qk`, `blocks.0.ln1.v`, `blocks.0.ln2`.
            scale: The activation at `scale_hook`. None, where the site is affine: read as every
                token but the first of a prompt does.
        """

    def value_bias(self, layer: int) -> Float[Tensor, "head d_head"]:
        """What biases add to a layer's values: b_V, and what the norm's bias adds through W_V."""
        attention = self.attention(layer)
        norm = self.read(f"blocks.{layer}.ln1.v", torch.ones(1, device=self.device))
        if norm.bias is None:
            return attention.b_V
        return attention.b_V + einsum(norm.bias, attention.W_V, "d, head d k -> head k")

    def not_affine(self, sites: Collection[str], logits: bool, scores: bool = False) -> list[str]:
        """What stands between the stream and a number that is not affine.

        Args:
            sites: The norms that the number is read through.
            logits: Whether the number is a logit.
            scores: Whether it is an attention score.
        """
        caps = [LOGIT_CAP] * (logits and self.logit_cap > 0)
        caps += [SCORE_CAP] * (scores and self.score_cap > 0)
        if (noted := _noted.get()) is not None:
            noted.update(dict.fromkeys([*sites, *caps]))
            return []
        return [site for site in sites if not self.is_affine(site)] + caps

    def how_to_freeze(self, found: Collection[str]) -> str:
        """What to do about the norms in what is not affine, and what that costs where it was
        measured; nothing to say about soft caps, which stay."""
        sites = [site for site in found if site not in (LOGIT_CAP, SCORE_CAP)]
        owner, costs = getattr(self.model, _SITE_COSTS, (None, {}))
        costs = costs if owner == id(self.model) else {}
        if not sites:
            return ""
        it, known = "it" if len(sites) == 1 else "them", ""
        if all(site in costs for site in sites):
            added = ", ".join(f"{costs[site]:+.3f}" for site in sites[:4])
            added += ", ..." * (len(sites) > 4)
            each = "it adds" if len(sites) == 1 else "each alone adds"
            known = f"; untrained, {each} {added} nats per token on the text of site_sensitivity"
        return (
            f": freeze {it} with lf.freeze_for(model, question, text), which measures the price"
            f"{known}"
        )

    def constant_read(self, site: str, logits: bool = False) -> Read:
        """How a norm reads the stream on every input, at every token but the first of a prompt,
        for which it may have a constant of its own.

        Raises:
            InexactError: if the norm is live, or the logits behind it are capped.
        """
        if found := self.not_affine([site], logits):
            raise InexactError(
                f"{' and '.join(found)} depends on the input, so products of weights are not what "
                f"the model computes{self.how_to_freeze(found)}"
            )
        # A norm is live here only where reads are noted.
        live = None if self.is_affine(site) else torch.ones(1, device=self.device)
        return self.read(site, live)

    # How the model runs

    @abstractmethod
    def run(
        self,
        x: Int[Tensor, "batch pos"] | Stream,
        names: Collection[str] = (),
        *,
        start: int = 0,
        stop: int | None = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> tuple[Stream, dict[str, Tensor]]:
        """The stream before a block, and activations that a run computes on the way.

        Args:
            x: Token ids; or the stream before block `start`.
            names: Hook names of the activations to keep.
            start: The block that a stream enters.
            stop: The block to stop before. Default: stop behind the last block.
            edits: Functions that replace an activation, by hook name.
        """

    @abstractmethod
    def logits(
        self, resid: Stream, names: Collection[str] = (), *, first: First = None
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
        """The logits that the model's own final norm, unembedding and soft cap give for a stream.

        Args:
            resid: The stream, [batch, pos, d_model].
            names: Hook names of the activations to keep; `unembed.hook_out` has the logits before
                a soft cap.
            first: Whether each token comes first in its prompt. Default: those at position 0 do.
        """

    @abstractmethod
    def through_norm(self, site: str, x: Stream, *, first: First = None) -> Stream:
        """A stream after the model's own norm at a site.

        Args:
            site: The norm site.
            x: The stream, [batch, pos, d_model].
            first: Whether each token comes first in its prompt. Default: those at position 0 do.
        """

    @abstractmethod
    def through_norm_in_float64(self, site: str) -> Callable[[Tensor], Tensor]:
        """A function that applies the model's own norm to a stream in float64."""

    # Tokens

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.model.tokenizer

    @cached_property
    def device(self) -> torch.device:
        """The device that tokens must be on."""
        return self.W_E.device

    def tokenize(self, text: str, prepend_bos: bool | None) -> list[int]:
        """The token ids of a text, not truncated, as TransformerLens' `to_tokens` gives them.

        `to_tokens` is not called, since it changes `cfg.default_prepend_bos` while it runs.

        Raises:
            DataError: if the model has no tokenizer.
        """
        given, dropped, _ = self._to_encode(text, prepend_bos)
        return list(self.tokenizer(given)["input_ids"])[dropped:]

    def tokenize_with_spans(
        self, text: str, prepend_bos: bool | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The same token ids, and for each the characters of the text that it stands for, first to
        one past the last; none for tokens that stand for no text, such as that of its beginning.

        Raises:
            DataError: if the model has no tokenizer, or one that does not say which characters its
                tokens stand for.
        """
        given, dropped, shift = self._to_encode(text, prepend_bos)
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                f"a {type(self.tokenizer).__name__} does not say which characters its tokens stand "
                "for: give the model a fast tokenizer, one with a tokenizer.json"
            )
        found = self.tokenizer(given, return_offsets_mapping=True)
        spans = [(max(a - shift, 0), max(b - shift, 0)) for a, b in found["offset_mapping"]]
        return list(found["input_ids"])[dropped:], spans[dropped:]

    def _to_encode(self, text: str, prepend_bos: bool | None) -> tuple[str, int, int]:
        """What the tokenizer is given, how many of its first tokens are then left out, and how many
        characters stand before the text."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise DataError(f"the model has no tokenizer to read {text!r:.60} with: give token ids")
        bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        adds_bos = bool(self.cfg.tokenizer_prepends_bos)
        before = tokenizer.bos_token if bos and not adds_bos else ""
        return before + text, int(adds_bos and not bos), len(before)

    def strings(self, ids: Collection[int]) -> list[str]:
        """Each token id as text; as a number for a model without a tokenizer."""
        if self.tokenizer is None:
            return [f"<{token}>" for token in ids]
        return [str(self.tokenizer.decode([token])) for token in ids]


def view_of(model: Any) -> View:
    """The view that fits a model.

    Raises:
        UnsupportedModelError: if it is neither a `HookedTransformer` nor a `TransformerBridge`, or
            its stream is not the plain sum of its parts.
    """
    if isinstance(model, View):
        return model
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if "HookedTransformer" in kinds:
        from lnfree_interp.analysis.hooked import HookedView

        return HookedView(model)
    if "TransformerBridge" in kinds:
        from lnfree_interp.analysis.bridge import BridgeView

        return BridgeView(model)
    raise UnsupportedModelError(
        f"an analysis takes a HookedTransformer or a TransformerBridge, not a "
        f"{type(model).__name__}: lf.load(...) makes one"
    )
