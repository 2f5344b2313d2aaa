"""Weights of one architecture as the start of another: what is copied, changed, new and lost."""

import copy
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.positions import whole_number
from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.models.agreement import compare_logits, random_tokens
from lnfree_interp.models.block import TiedUnembed
from lnfree_interp.models.folding import fold_weights, writes_to_stream
from lnfree_interp.models.norm_map import NormMap
from lnfree_interp.models.running import require_hooked
from lnfree_interp.models.site_names import whole_norm
from lnfree_interp.models.sites import list_norm_sites, norm_at, stock_weights
from lnfree_interp.numerics import MeasuredError
from lnfree_interp.tuning.parameter_mask import ParameterMask, every

Category = Literal["copied", "transformed", "initialised", "dropped"]

CENTRED = "LayerNorm is RMSNorm of a stream whose writers are centred (arXiv 2305.14858)"
FACTOR = "a norm's constant factor is a factor of its gain and bias (LayerNorm Scaling)"
REPEATED = "keys and values of a group, repeated for each head that shares them"
POSITIONS = "the positions that the target has"
TIED = "a tied unembedding is the transposed embedding, without a bias"


@dataclass(frozen=True)
class TransferredTensor:
    """What became of one tensor."""

    name: str
    """Its name in the target; of one that was dropped, in the source."""
    category: Category
    """`"copied"`: bit for bit; `"transformed"`: by an identity; `"initialised"`: as the target had
    it; `"dropped"`: of the source, and nowhere in the target."""
    source: tuple[str, ...]
    """The tensors of the source that it comes from."""
    how: str
    """The identity by name, or why it was not copied; empty where it was."""
    entries: int
    """How many numbers it holds."""


@dataclass(frozen=True, eq=False, repr=False)
class Transfer:
    """A target with the weights of a source, and what became of each tensor of both.

    Examples:
        >>> transfer = lf.transfer_weights(model, lf.to_sub_ln(lf.untrained(model)).model)
        >>> transfer.fresh
        7,680 entries of 16 parameters
    """

    model: HookedTransformer
    """The target with the weights of the source; the given target is as it was."""
    tensors: tuple[TransferredTensor, ...]
    """Every parameter of the target, in its order, then those of the source that were dropped."""
    error: MeasuredError | None
    """The largest logit difference from the source, on random tokens; None if the two have
    different vocabularies."""

    def of(self, category: str) -> tuple[TransferredTensor, ...]:
        """The tensors of one category.

        Raises:
            DataError: if there is no such category.
        """
        known = get_args(Category)
        if category not in known:
            raise DataError(f"category={category!r} does not exist: give one of {', '.join(known)}")
        return tuple(one for one in self.tensors if one.category == category)

    @property
    def fresh(self) -> ParameterMask:
        """The parameters that the source says nothing about: `Recipe(trainable=transfer.fresh)`
        trains them alone, and a `Release` the others later."""
        weights = stock_weights(self.model)
        new = self.of("initialised")
        return ParameterMask({one.name: every(weights[one.name].shape) for one in new})

    def to_frame(self) -> pd.DataFrame:
        """One row per tensor: `tensor`, `category`, `source`, `how`, `entries`."""
        return pd.DataFrame(
            [
                {
                    "tensor": one.name,
                    "category": one.category,
                    "source": ", ".join(one.source),
                    "how": one.how,
                    "entries": one.entries,
                }
                for one in self.tensors
            ]
        )

    def __str__(self) -> str:
        frame = self.to_frame()
        rows = frame.groupby(["category", "how"], sort=False)["entries"].agg(["size", "sum"])
        lines = [
            f"{category}: {size} tensors, {total:,} entries{f'; {how}' if how else ''}"
            for (category, how), size, total in zip(
                rows.index, rows["size"], rows["sum"], strict=True
            )
        ]
        difference = "not compared: other vocabularies" if self.error is None else str(self.error)
        return "\n".join([*lines, f"largest logit difference from the source: {difference}"])

    def __repr__(self) -> str:
        found = dict.fromkeys(one.category for one in self.tensors)
        counts = ", ".join(f"{len(self.of(category))} {category}" for category in found)
        return f"Transfer({counts}; largest logit difference {self.error})"


@dataclass(frozen=True, eq=False)
class _Given:
    """A tensor of the source, as it may go into a target."""

    W: Tensor
    source: tuple[str, ...]
    how: str = ""


def transfer_weights(
    source: HookedTransformer,
    target: HookedTransformer,
    *,
    layers: Mapping[int, int] | None = None,
    leave: str | Sequence[str] = (),
) -> Transfer:
    """Start one architecture from the weights of another.

    Tensors of the same name and shape are copied. Where an identity makes one architecture's tensor
    of another's, it is used: LayerNorms become RMSNorms (writers are centred, and norms' biases go
    into what reads them where the target has none), constant factors of norms go into their gains,
    shared keys and values are repeated for each head, positions beyond the target's are cut off.
    Everything else stays as it is in the target.

    Args:
        source: The model whose weights are taken, in any form.
        target: The model to start; such as `lf.to_linear_attention(lf.untrained(source)).model`.
        layers: Which layer of the source each layer of the target takes. Default: that of the same
            number, as far as there are any.
        leave: Names of tensors of the target that stay as they are, with wildcards:
            `"blocks.*.attn.W_[QK]"`.

    Returns:
        A `Transfer`: `.model`, and a report in which every tensor of either model is once.

    Raises:
        DataError: if `layers` names one that does not exist, or nothing in the target has a name
            in `leave`.
        UnsupportedModelError: if one is no `HookedTransformer`, or nothing of the source fits.

    Source:
        Cross-architecture transfer: arXiv 2404.02684; the report is ours.

    Examples:
        >>> new = lf.to_linear_attention(lf.untrained(model, seed=1), [0, 2]).model
        >>> transfer = lf.transfer_weights(model, new, leave=["blocks.[02].attn.W_[QK]"])
        >>> {one.name for one in transfer.of("initialised")} == {
        ...     f"blocks.{layer}.attn.W_{name}" for layer in (0, 2) for name in "QK"}
        True
    """
    for one in (source, target):
        require_hooked(one)
        if not isinstance(one, HookedTransformer):
            raise UnsupportedModelError(
                f"a HookedTransformer is needed, not a {type(one).__name__}: lf.load(...) makes one"
            )
    leave = [leave] if isinstance(leave, str) else leave
    model = copy.deepcopy(target)
    places = _own(model)
    pool = _pool(source, model)
    layers = _layers(source, model, layers)
    for pattern in leave:
        if not fnmatch.filter(places, pattern):
            raise DataError(
                f"leave: no parameter of the target is called {pattern!r}; some are "
                f"{', '.join(list(places)[:4])}"
            )
    heads_alike = source.cfg.n_heads == model.cfg.n_heads
    factors = [_factors(source), _factors(model)]
    tensors = []
    with torch.no_grad():
        for name, W in places.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in leave):
                found = "left as it was"
            else:
                found = _fitting(name, W, pool, layers, heads_alike, factors)
            if isinstance(found, str):
                tensors.append(TransferredTensor(name, "initialised", (), found, W.numel()))
                continue
            W.copy_(found.W)
            category: Category = "transformed" if found.how else "copied"
            tensors.append(TransferredTensor(name, category, found.source, found.how, W.numel()))
    used = {name for one in tensors for name in one.source}
    if not used:
        raise UnsupportedModelError(
            "no tensor of the source fits the target: "
            + "; ".join(f"{one.name}: {one.how}" for one in tensors[:3])
        )
    tensors += _dropped(source, model, used)
    error = None
    if source.cfg.d_vocab == model.cfg.d_vocab:
        shorter = min(source, model, key=lambda one: one.cfg.n_ctx)
        error = compare_logits(model, source, random_tokens(shorter))
    return Transfer(model.eval(), tuple(tensors), error)


def _own(model: HookedTransformer) -> dict[str, Tensor]:
    """A model's parameters by stock name, a tied unembedding once."""
    weights = stock_weights(model)
    if isinstance(model.unembed, TiedUnembed):
        del weights["unembed.W_U"], weights["unembed.b_U"]
    return weights


def _layers(
    source: HookedTransformer, target: HookedTransformer, given: Mapping[int, int] | None
) -> dict[int, int]:
    ours, theirs = target.cfg.n_layers, source.cfg.n_layers
    if given is None:
        return {layer: layer for layer in range(min(ours, theirs))}
    if not isinstance(given, Mapping):
        raise DataError(
            f"layers is a mapping from the target's layers to the source's, not {given!r}"
        )
    given = {
        whole_number(here, "a layer"): whole_number(there, "a layer")
        for here, there in given.items()
    }
    for here, there in given.items():
        if not (0 <= here < ours and 0 <= there < theirs):
            raise DataError(
                f"layers: {here} from {there}; the target has layers 0 to {ours - 1}, the source 0 "
                f"to {theirs - 1}"
            )
    return given


def _pool(source: HookedTransformer, target: HookedTransformer) -> dict[str, _Given]:
    """The tensors of the source, changed where that keeps its function under the target's norms."""
    own = _own(source)
    pool = {name: _Given(W, (name,)) for name, W in own.items()}
    W_U, b_U = source.W_U.detach(), source.b_U.detach()
    tied = isinstance(target.unembed, TiedUnembed)
    if "unembed.W_U" not in own:
        pool["unembed.W_U"] = _Given(W_U, ("embed.W_E",), TIED)
        pool["unembed.b_U"] = _Given(b_U, ("embed.W_E",), TIED)
    elif tied and torch.equal(W_U, source.W_E.T) and not b_U.any():
        of = ("embed.W_E", "unembed.W_U", "unembed.b_U")
        pool["embed.W_E"] = _Given(own["embed.W_E"], of)
    if tied or not (_all(source, centred=True) and _all(target, centred=False)):
        return pool
    norms = {str(site): norm_at(source, site) for site in list_norm_sites(source)}
    biased = {norm_at(target, site).bias is not None for site in list_norm_sites(target)}
    if len(biased) > 1:
        return pool
    paths = {whole_norm(site) for site in norms}
    around = {name: one.W for name, one in pool.items() if name.rpartition(".")[0] not in paths}
    if biased == {False}:
        # The biases alone: gains stay gains.
        only = {
            site: NormMap(centred=False, statistic=None, scale=1.0, bias=norm.bias)
            for site, norm in norms.items()
        }
        around = dict(fold_weights(around, only, "folded"))
    biases = [name for name in own if name.endswith((".ln1.b", ".ln2.b", "ln_final.b"))]
    for name, W in around.items():
        before = pool[name]
        after = W - W.mean(-1, keepdim=True) if writes_to_stream(name) else W
        if torch.equal(after, before.W):
            continue
        of = before.source
        if biased == {False} and not writes_to_stream(name):
            of += tuple(bias for bias in biases if _reads(name, bias))
        pool[name] = _Given(after, of, CENTRED)
    return pool


def _reads(name: str, bias: str) -> bool:
    """Whether a parameter's bias takes up a norm's."""
    block, norm = bias.rpartition(".")[0].rpartition(".")[::2]
    if norm == "ln_final":
        return name == "unembed.b_U"
    return name.startswith(f"{block}.{'attn' if norm == 'ln1' else 'mlp'}.b_")


def _all(model: HookedTransformer, *, centred: bool) -> bool:
    """Whether every norm is a live LayerNorm, or every one a live RMSNorm, before a sublayer."""
    if model.cfg.normalization_type not in ("LN", "RMS"):
        return False
    plain = ("ln1", "ln1.qk", "ln1.v", "ln2", "ln_final")
    sites = list_norm_sites(model)
    norms = [norm_at(model, site) for site in sites if site.kind in plain]
    if len(norms) < len(sites):
        return False
    return all(norm.centred == centred and not norm.affine and not norm.pointwise for norm in norms)


def _fitting(
    name: str,
    W: Tensor,
    pool: Mapping[str, _Given],
    layers: Mapping[int, int],
    heads_alike: bool,
    factors: Sequence[Mapping[str, float]],
) -> _Given | str:
    """What of the source goes into a tensor of the target; or in words why nothing does."""
    there = _in_source(name, layers)
    if there is None:
        return "a layer that the source does not have"
    given = pool.get(there)
    if given is None and name.rpartition(".")[2] in ("W_K", "W_V", "b_K", "b_V"):
        block, _, leaf = there.rpartition(".")
        given = pool.get(f"{block}._{leaf}")
    if given is None:
        return "the source has no such parameter"
    found, how = given.W, given.how
    if found.shape != W.shape and re.search(r"\.attn\._?[Wb]_[KV]$", name):
        times, rest = divmod(len(W), len(found))
        if heads_alike and found.shape[1:] == W.shape[1:] and not rest:
            found, how = found.repeat_interleave(times, dim=0), REPEATED
    if name == "pos_embed.W_pos" and len(found) > len(W):
        found, how = found[: len(W)], how or POSITIONS
    if found.shape != W.shape:
        return f"another shape: {list(found.shape)} in the source, {list(W.shape)} in the target"
    # By what a gain or bias is multiplied, so that its norm gives what the source's does.
    path, _, leaf = name.rpartition(".")
    if leaf in ("w", "b") and path in factors[1]:
        ratio = factors[0].get(there.rpartition(".")[0], 1.0) / factors[1][path]
        found, how = (found, how) if ratio == 1 else (found * ratio, FACTOR)
    if found.dtype != W.dtype:
        how = how or f"{found.dtype} as {W.dtype}".replace("torch.", "")
    return replace(given, W=found, how=how)


def _in_source(name: str, layers: Mapping[int, int]) -> str | None:
    match = re.match(r"blocks\.(\d+)(\..+)", name)
    if match is None:
        return name
    layer = layers.get(int(match[1]))
    return None if layer is None else f"blocks.{layer}{match[2]}"


def _factors(model: HookedTransformer) -> dict[str, float]:
    """The constant that each norm multiplies by, by the path of its module."""
    return {whole_norm(str(s)): norm_at(model, s).factor for s in list_norm_sites(model)}


def _dropped(
    source: HookedTransformer, target: HookedTransformer, used: Collection[str]
) -> list[TransferredTensor]:
    found = []
    targets, own = _own(target), _own(source)
    for name, W in own.items():
        if name in used:
            continue
        if name.startswith("unembed.") and isinstance(target.unembed, TiedUnembed):
            why = "the target's unembedding is its embedding"
        elif name in targets:
            why = "the target keeps its own"
        else:
            why = "the target has no such parameter"
        found.append(TransferredTensor(name, "dropped", (name,), why, W.numel()))
    return found
