"""A forward pass as a value: its tokens, the activations that were kept, and what is held.

Every question about a prompt goes to a `Trace`. A trace also carries a direction of the stream back
to the tokens: given attention patterns and neuron gates, a model is affine in its embeddings. The
gate of a ReLU neuron is 0 or 1, the gate of a GELU neuron is the secant post / pre, and a gated MLP
is linear in the input that its gate multiplies.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NoReturn, SupportsIndex, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.positions import Positions, read_number, read_position
from lnfree_interp.analysis.prompts import LONG_RUN, Prompt, find_padding, read_prompts
from lnfree_interp.analysis.stream import Place, Read, Stream
from lnfree_interp.analysis.sublayers import GivenBlock, GivenMLP
from lnfree_interp.analysis.view import (
    LOGIT_CAP,
    SCORE_CAP,
    Model,
    Side,
    View,
    noting_reads,
    view_of,
)
from lnfree_interp.errors import DataError, InexactError
from lnfree_interp.models.site_names import name_sites
from lnfree_interp.numerics import own_precision


class NotAffineError(InexactError):
    """A question met the first norm or soft cap that it reads through and is not affine."""


class Trace:
    """One forward pass over one prompt or several, as a value.

    Attributes:
        view: The model.
        tokens: [prompt, pos]. Shorter prompts are filled up on the right, where no token looks.
        lengths: The number of tokens of each prompt.
        single: Whether there is one prompt, as opposed to a batch of one.
        hold: Whether what is not affine is held at the value it had.
        runs: How often the model ran for this trace.
    """

    def __init__(
        self,
        view: View,
        rows: list[Int[Tensor, " _"]],
        *,
        single: bool = False,
        hold: bool = False,
        keep: Literal["all", "asked"] = "all",
        kept: Mapping[str, Tensor] | None = None,
        given_logits: Float[Tensor, "prompt pos d_vocab"] | None = None,
    ):
        self.view, self.single, self.hold = view, single, hold
        self.keep: Literal["all", "asked"] = keep
        self.lengths = tuple(len(row) for row in rows)
        if len(set(self.lengths)) > 1 and view.cfg.attention_dir != "causal":
            raise DataError(
                "this model looks ahead, so its prompts must be equally long: trace them one by one"
            )
        self.tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self.runs = 0
        self.unmasked: tuple[int, ...] = ()
        self.given_logits = given_logits
        self._kept = {name: self._by_token(name, x) for name, x in (kept or {}).items()}
        self._device: torch.device | str | None = None
        self._blocks: dict[int, GivenBlock] = {}

    # Activations

    @property
    def batch(self) -> int:
        """The number of prompts."""
        return len(self.lengths)

    @property
    def n_pos(self) -> int:
        """The number of tokens of the longest prompt."""
        return self.tokens.shape[1]

    @functools.cached_property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """Each prompt's tokens, as strings."""
        rows = [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]
        return tuple(tuple(self.view.strings(row)) for row in rows)

    @own_precision
    def need(self, *names: str) -> "Trace":
        """Make sure that these activations are kept, by hook name, with one run at most.

        Raises:
            DataError: if the trace was made from a given run, whose cache lacks one of them; or if
                a forward pass does not reach one.
            UnsupportedModelError: if the model has no such hook point.
        """
        missing = {name for name in names if name not in self._kept}
        if not missing:
            return self
        if self.given_logits is not None:
            raise DataError(
                f"the given run's cache lacks {min(missing)} (and {len(missing) - 1} more): "
                "call run_with_cache without a names_filter, which keeps everything"
            )
        if self.keep == "all" and not self._kept:
            missing |= set(self._everything())
        _, found = self.view.run(self.tokens, missing)
        self.runs += 1
        self._kept |= {name: self._by_token(name, x) for name, x in found.items()}
        if self._device is not None:
            self.to(self._device)
        if unreached := sorted(missing - found.keys()):
            raise DataError(
                f"a forward pass of this model does not reach {', '.join(unreached)}: give the "
                "hook name of an activation that it computes"
            )
        return self

    def _by_token(self, name: str, x: Tensor) -> Tensor:
        """TransformerLens' norms of queries and keys see batch, position and head as one."""
        if x.ndim == 2 and name.endswith((".q_norm.hook_scale", ".k_norm.hook_scale")):
            return x.view(self.batch, self.n_pos, -1, 1)
        return x

    def act(self, name: str, layer: int | None = None) -> Tensor:
        """An activation by TransformerLens' short name: `trace.act("z", 3)`."""
        hook = get_act_name(name, layer)
        return self.need(hook)._kept[hook].to(self.view.device)

    def __getitem__(self, hook: str) -> Tensor:
        """An activation by hook name; the trace keeps it from now on."""
        return self.need(hook)._kept[hook].to(self.view.device)

    def _everything(self) -> list[str]:
        """Hook names of all activations that a question may need."""
        view = self.view
        names = [get_act_name("embed"), *self.block_names(view.last), *self.scale_names()]
        for layer in range(view.n_layers):
            more = ["attn_out", "v", "attn_scores", "rot_q" if view.rotary else "q"]
            more += ["rot_k" if view.rotary else "k", *(["mlp_out"] if view.has_mlps else [])]
            names += [get_act_name(name, layer) for name in more]
        return names

    def block_names(self, place: Place) -> list[str]:
        """Hook names that `block` and `stream` need, for all blocks before a place."""
        view, names = self.view, [get_act_name("embed")]
        names += [get_act_name("pos_embed")] if view.has_positions else []
        for layer in range(place.layer + place.mid):
            short = ["pattern", "z"]
            if view.has_mlps and layer < place.layer:
                short += ["post", "pre", *(["pre_linear"] if view.gated else [])]
            names += [get_act_name(name, layer) for name in short]
            names.append(Place(layer).hook)
            if view.has_mlps and not view.parallel:
                names.append(Place(layer, mid=True).hook)
        return [*names, place.hook]

    def scale_names(self, sites: list[str] | None = None) -> list[str]:
        """Hook names of the scales of live norms; by default of all norms but the final one. Live
        curves have none."""
        view = self.view
        if sites is None:
            kinds = ("ln1.qk", "ln1.v", *(("ln2",) if view.has_mlps else ()))
            sites = [f"blocks.{i}.{kind}" for i in range(view.n_layers) for kind in kinds]
            if view.explains_scores:
                sides = itertools.product(range(view.n_layers), get_args(Side))
                sites += [site for one in sides if (site := view.qk_norm(*one)) is not None]
        sites = [site for site in sites if not view.bends(site)]
        return [hook for site in sites if (hook := view.scale_hook(site)) is not None]

    def stream(self, place: Place) -> Stream:
        """The residual stream at a place."""
        return self[place.hook]

    def embeds(self) -> dict[str, Stream]:
        """What the embeddings write to the stream, by kind of component."""
        names = ["embed", *(["pos_embed"] if self.view.has_positions else [])]
        return {name: self.act(name) for name in names}

    def read(self, site: str, at: Positions | None = None) -> Read:
        """How a norm reads the stream in this pass."""
        hook = self.view.scale_hook(site)
        read = self.view.read(site, None if hook is None else self[hook])
        if at is None or not isinstance(read.scale, Tensor):
            return read
        return replace(read, scale=at.of(read.scale))

    def require_affine(
        self, sites: list[str], *, logits: bool = False, scores: bool = False
    ) -> tuple[str, ...]:
        """What has to be held so that a number is a sum over parts of the stream.

        Args:
            sites: The norms that the number is read through.
            logits: Whether it is a logit.
            scores: Whether it is an attention score.

        Raises:
            InexactError: if something has to be held and this trace does not hold it.
            UnsupportedModelError: if it is a live curve, which cannot be held.
        """
        found = self.view.not_affine(sites, logits, scores)
        if found and not self.hold:
            raise NotAffineError(self._refusal(found))
        self._require_scales(found)
        return tuple(found)

    def _require_scales(self, names: list[str]) -> None:
        """Refuse live curves, which have no scale that could be held."""
        for name in names:
            if name not in (LOGIT_CAP, SCORE_CAP):
                self.view.scale_hook(name)

    def _refusal(self, found: list[str]) -> str:
        how = self.view.how_to_freeze(found)
        return (
            f"{name_sites(found)} {'is' if len(found) == 1 else 'are'} not affine, so no part of "
            f"the stream has a share of its own{how}{'; or hold' if how else ': hold'} "
            f"{'it at the value it' if len(found) == 1 else 'them at the values they'} had with "
            "lf.trace(model, prompt, hold=True): the result then says by how much its parts miss "
            "what the model does"
        )

    def refuse(self, ask: Callable[[], Any]) -> NoReturn:
        """Refuse a question with the names of all that it reads through and is not affine.

        Raises:
            UnsupportedModelError: if one of them is a live curve, which cannot be held either.
            InexactError: otherwise.
        """
        with noting_reads() as noted:
            ask()
        caps = (LOGIT_CAP, SCORE_CAP)
        found = [name for name in noted if name in caps or not self.view.is_affine(name)]
        self._require_scales(found)
        raise InexactError(self._refusal(found)) from None

    def require_text(self) -> "Trace":
        """Refuse a prompt that seems to end in padding.

        Raises:
            DataError: if a prompt seems to end in padding; it says how to tell padding from text.
        """
        rows = ((i, self.tokens[i, : self.lengths[i]]) for i in self.unmasked)
        if padded := find_padding(self.view, rows):
            raise DataError(padded)
        return self

    # Positions

    def positions(self, pos: Any = -1) -> Positions:
        """One position of every prompt, counted from its own end if negative; or a slice.

        Raises:
            DataError: if a prompt has no such position.
        """
        if isinstance(pos, slice):
            if (pos.step or 1) < 0:
                raise DataError(f"{pos} runs backwards: give it a positive step")
            if len(set(self.lengths)) > 1:
                raise DataError(
                    "the prompts differ in length, and a slice of positions is for prompts of one "
                    "length: trace them one by one"
                )
            if not range(self.n_pos)[pos]:
                raise DataError(f"{pos} selects none of {self.n_pos} positions")
            return Positions(pos)
        places = [read_position(pos, n) for n in self.lengths]
        if len(set(places)) == 1:
            return Positions(slice(places[0], places[0] + 1))
        return Positions(torch.tensor(places)[:, None])

    def first(self, at: Positions) -> Bool[Tensor, "batch kept"]:
        """Whether each of some positions is the first of its prompt."""
        first = (at.numbers(self.n_pos, self.batch) == 0).to(self.view.device)
        return first if at.repeat == 1 else first.expand(-1, at.repeat)

    def spread(self, u: Float[Tensor, "batch kept d_model"], at: Positions) -> Stream:
        """Directions at some positions, in the shape of a stream that is zero elsewhere."""
        where = at.numbers(self.n_pos, self.batch).to(u.device)
        return u.new_zeros(self.batch, self.n_pos, u.shape[-1]).scatter_add_(
            1, where[..., None].expand(u.shape), u
        )

    # Directions carried back

    def block(self, layer: int) -> GivenBlock:
        """A block with its patterns and gates given."""
        if self._device is not None:  # a block has activations where the model is
            return self._given(layer)
        if layer not in self._blocks:
            self._blocks[layer] = self._given(layer)
        return self._blocks[layer]

    def _given(self, layer: int) -> GivenBlock:
        view, site = self.view, f"blocks.{layer}.ln1.v"
        mlp = self._given_mlp(layer) if view.has_mlps else None
        return GivenBlock(
            layer, view.attention(layer), self.act("pattern", layer), self.act("z", layer),
            self.value_bias(layer), self.read(site), mlp,
        )  # fmt: skip

    def value_bias(
        self, layer: int, at: Positions | None = None
    ) -> Float[Tensor, "*batch_pos head d_head"]:
        """What value biases add to each head's z: the same at every token for a softmax, whose
        weights add up to one, [head, d_head]; else [batch, pos, head, d_head]."""
        b_V = self.view.value_bias(layer)
        if self.view.weighing(layer) == "softmax":
            return b_V
        weights = self.act("pattern", layer)
        weights = weights if at is None else at.of(weights, dim=2)
        return weights.sum(-1).transpose(1, 2)[..., None] * b_V

    def _given_mlp(self, layer: int) -> GivenMLP:
        weights, site = self.view.mlp(layer), f"blocks.{layer}.ln2"
        # A question that reads through a live curve was refused by require_affine.
        before = Read() if self.view.bends(site) else self.read(site)
        pre, post = self.act("pre", layer), self.act("post", layer)
        shift = 0 if before.bias is None else before.bias @ weights.W_in
        b_post = weights.b_in if self.view.gated else torch.zeros_like(weights.b_in)
        if self.view.gated:
            gate, linear = weights.activation(pre), "pre_linear"
            b_in = b_post + gate * shift
        else:
            gate, linear = torch.where(pre == 0, 0.0, post / pre), "pre"
            b_in = gate * (weights.b_in + shift)
        hook = get_act_name(linear, layer)
        return GivenMLP(weights, post, gate, hook, b_in, b_post, before)

    def back(
        self, u: Stream, place: Place, given: Collection[str] = ()
    ) -> Iterator[tuple[GivenBlock, Stream | None, Stream, Stream]]:
        """A direction of the stream at a place, carried back block by block to the embeddings.

        Args:
            u: [batch, pos, d_model], at the place.
            place: Where it starts.
            given: Sublayers whose output is given, such as `2_mlp_out`: the direction does not
                pass through them.

        Yields:
            The block, then three directions: behind the block (None if the way starts inside it),
            where its attention writes, and before the block.
        """
        for layer in reversed(range(place.layer + place.mid)):
            block, behind = self.block(layer), u if layer < place.layer else None
            if behind is not None and block.mlp is not None and f"{layer}_mlp_out" not in given:
                u = u + block.mlp.back(u)
            at_attn = behind if behind is not None and self.view.parallel else u
            if f"{layer}_attn_out" not in given:
                u = u + block.back(at_attn)
            yield block, behind, at_attn, u

    def sites_back(self, place: Place, given: Collection[str] = ()) -> list[str]:
        """The norms that `back` reads through."""
        kinds = [("attn_out", "ln1.v", place.layer + place.mid)]
        kinds += [("mlp_out", "ln2", place.layer)] * self.view.has_mlps
        return [
            f"blocks.{layer}.{norm}"
            for kind, norm, n_layers in kinds
            for layer in range(n_layers)
            if f"{layer}_{kind}" not in given
        ]

    # The trace as a value

    def attribute(self, target: Any, by: Any = "head", *, biases: bool = False) -> Any:
        """The same as `lf.attribute(trace, target, by)`."""
        from lnfree_interp.analysis.attribute import attribute

        return attribute(self, target, by, biases=biases)

    def select(self, prompt: SupportsIndex) -> "Trace":
        """The trace of one prompt of the batch, without running the model again.

        Raises:
            DataError: if there is no such prompt.
        """
        number = read_number(prompt, self.batch, "prompt")
        n, one = self.lengths[number], slice(number, number + 1)

        def cut(name: str, x: Tensor) -> Tensor:
            both = name.endswith(("hook_pattern", "hook_attn_scores"))
            return x[one, :, :n, :n] if both else x[one, :n]

        logits = None if self.given_logits is None else self.given_logits[one, :n]
        chosen = Trace(
            self.view, [self.tokens[number, :n]], single=True, hold=self.hold, keep=self.keep,
            kept={name: cut(name, x) for name, x in self._kept.items()}, given_logits=logits,
        )  # fmt: skip
        chosen.unmasked = (0,) if number in self.unmasked else ()
        chosen._device = self._device
        return chosen

    def to(self, device: torch.device | str) -> "Trace":
        """Keep activations on a device, those of later runs too; questions still compute where the
        model is."""
        self._device = device
        self._kept = {name: x.to(device) for name, x in self._kept.items()}
        self._blocks.clear()
        return self

    def free(self) -> "Trace":
        """Drop the activations, a given run's too; the next question runs the model again."""
        self.given_logits = None
        self._kept.clear()
        self._blocks.clear()
        return self

    def __len__(self) -> int:
        return self.batch

    def __repr__(self) -> str:
        size = sum(x.nbytes for x in self._kept.values()) / 2**20
        held = "what is not affine is held" if self.hold else "nothing is held"
        prompts = "1 prompt" if self.batch == 1 else f"{self.batch} prompts"
        return (
            f"Trace({prompts} of up to {self.n_pos} tokens, {len(self._kept)} activations kept, "
            f"{size:.1f} MiB; {held})"
        )


@torch.no_grad()
def trace(
    model: Model,
    prompt: Prompt,
    *,
    prepend_bos: bool | None = None,
    attention_mask: Any = None,
    hold: bool = False,
    keep: Literal["all", "asked"] = "all",
    run: tuple[Tensor, Any] | None = None,
) -> Trace:
    """One forward pass as a value, to ask any number of questions about.

    The model runs when the first question is asked, and not again.

    Args:
        model: A `HookedTransformer` in any form, or a `TransformerBridge`.
        prompt: One prompt or several, as text or token ids; several need not be equally long.
        prepend_bos: Whether each text starts with the beginning-of-sequence token; nothing is added
            to token ids. Default: what the model does, `cfg.default_prepend_bos`.
        attention_mask: [prompt, pos], 0 where a row of token ids is padding, on either side.
            Without a mask, what looks like padding is an error.
        hold: Whether live norms' scales and soft caps' slopes are held at the value they had.
            Results then say what was held, and measure what that misses.
        keep: `"all"`: the first run keeps everything that a question may need. `"asked"`: it keeps
            only what the questions need, and a question that needs more runs the model again.
        run: What `model.run_with_cache(tokens)` returned for these tokens, if it ran already.

    Returns:
        A `Trace`. `trace.attribute(target, by)` and every call that takes a trace ask it;
        `.select(i)` is one prompt of it, `.to(device)` moves what it keeps, `.free()` drops that.

    Raises:
        DataError: if a prompt is empty, longer than the context, outside the vocabulary, or seems
            padded without a mask; or if the run is a run on other tokens.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Ours. Activations are those of TransformerLens' `run_with_cache`.

    Examples:
        >>> trace = lf.trace(free, ["for i in", "while True"])
        >>> by_head = trace.attribute(lf.Logit(" range"), by="head")
        >>> paths = lf.expand_paths(trace.select(0), " range")
        >>> trace.runs
        1
    """
    view = view_of(model)
    if keep != "all" and keep != "asked":
        raise DataError(f"keep={keep!r} is not allowed: give 'all' or 'asked'")
    rows, single, unmasked = read_prompts(view, prompt, prepend_bos, attention_mask)
    if padded := find_padding(view, ((i, rows[i]) for i in unmasked), least=LONG_RUN):
        raise DataError(padded)
    logits, cache = (None, {}) if run is None else run
    made = Trace(
        view, rows, single=single, hold=hold, keep=keep, kept=dict(cache.items()),
        given_logits=logits,
    )  # fmt: skip
    made.unmasked = tuple(unmasked)
    if run is not None:
        _require_same_tokens(made)
    return made


def _require_same_tokens(made: Trace) -> None:
    embed, expected = made.act("embed"), made.view.W_E[made.tokens]
    if embed.shape != expected.shape or not torch.equal(embed, expected.to(embed)):
        raise DataError(
            "the run is of other tokens, or something changed its embeddings: run the model on the "
            "tokens of the prompt, without hooks"
        )
