"""Constant norms merged into the weights around them: the two finished forms of a model.

For a constant norm with gain a (the pretrained gain over sigma) and bias b, and a reader W, b_W of
its output, with C = I - 11^T/d (absent for RMSNorm):

    ((x C) * a + b) W + b_W  =  x [C diag(a) W]  +  [b_W + b W]

and for a constant norm on a sublayer's output or on queries and keys, W diag(a) + b. Exact in real
arithmetic, on every input. No weight that writes to the residual stream changes, so its activations
stay those of the model before. (2409.13710; the algebra is in the documentation.)

**Folded**: nothing is left, `normalization_type=None`. **Frozen**: the reader keeps a factor sigma
and a `FrozenNorm` divides by it, `normalization_type="LNPre"` (`"RMSPre"`), so that the tools of
TransformerLens that look for `hook_scale` run. The readers are centred in both forms.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerBase

from lnfree_interp.errors import NormSiteError
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.construct import copy_weights, hooked_transformer
from lnfree_interp.models.norms import FrozenNorm
from lnfree_interp.models.sites import get_norm, has_norm_sites, list_norm_sites, live_sites

Form = Literal["folded", "frozen"]

# Which norm feeds a weight, and which norm its output goes through, by the weight's last name.
_BEFORE = {
    "W_Q": "ln1.qk",
    "W_K": "ln1.qk",
    "W_V": "ln1.v",
    "W_in": "ln2",
    "W_gate": "ln2",
}
_AFTER = {"W_Q": "attn.q_norm", "W_K": "attn.k_norm", "W_O": "ln1_post", "W_out": "ln2_post"}

_CHUNK = 2**21
"""Elements that are folded in float64 at once, to keep the peak of memory low."""

# A reader counts as centred when its column means are below this share of its largest weight.
_CENTRED = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass(frozen=True)
class ConstantNorm:
    """A norm that divides by a constant: x -> (x C) * gain + bias."""

    gain: Float[Tensor, " d"]
    """What each channel is multiplied by: the pretrained gain over sigma."""
    bias: Float[Tensor, " d"] | None
    sigma: float
    """The constant shown as `hook_scale` in the frozen form; any positive number is exact."""


ConstantNorms = Mapping[str, ConstantNorm]
"""By site, `blocks.0.ln1.qk`, or by norm, `blocks.0.ln1`, where both paths share one."""


def fold_weights(
    weights: MutableMapping[str, Tensor], norms: ConstantNorms, centred: bool, form: Form
) -> Iterator[tuple[str, Tensor]]:
    """TransformerLens weights with the norms merged in, one by one.

    Args:
        weights: All weights but the norms' own; emptied on the way.
        norms: A constant norm for every site.
        centred: Whether the norms subtract the mean (LayerNorm) or not (RMSNorm).
        form: In the frozen form readers keep a factor sigma, which `FrozenNorm` divides by.
    """
    # The largest first: while there are few others, its copy is no peak.
    for name in sorted(weights, key=lambda name: -weights[name].numel()):
        prefix, _, leaf = name.rpartition(".")
        leaf = leaf.lstrip("_")
        if leaf.startswith("b_"):
            continue  # with its weight; b_O and the like follow below
        block = prefix.rpartition(".")[0]
        W = weights.pop(name)
        before = _norm_at(norms, block, "ln_final" if leaf == "W_U" else _BEFORE.get(leaf))
        after = _norm_at(norms, block, _AFTER.get(leaf))
        b_name = name.replace("W_", "b_")
        b = weights.pop(b_name, None) if b_name != name else None
        if before is not None:
            scale = sigma_of(norms, block, leaf) if form == "frozen" else 1.0
            W, b = _fold_reader(before, centred, scale, W, b)
        if after is not None:
            W = _scaled_outputs(after, W)
            b = None if b is None else _scaled_outputs(after, b)
        yield name, W
        if b is not None:
            yield b_name, b
    yield from weights.items()


def _norm_at(norms: ConstantNorms, block: str, kind: str | None) -> ConstantNorm | None:
    if kind is None:
        return None
    name = f"{block}.{kind}" if block else kind
    if name not in norms and kind.startswith("ln1."):
        name = f"{block}.ln1"
    return norms.get(name)


def sigma_of(norms: ConstantNorms, block: str, leaf: str) -> float:
    """The `hook_scale` that a reader meets: one per norm module, that of the values for `ln1`."""
    kind = {"W_U": "ln_final", "W_in": "ln2", "W_gate": "ln2"}.get(leaf, "ln1.v")
    norm = _norm_at(norms, block, kind)
    assert norm is not None
    return norm.sigma


def _fold_reader(
    norm: ConstantNorm,
    centred: bool,
    scale: float,
    W: Float[Tensor, "*head d_model out"],
    b: Float[Tensor, "*head out"] | None,
) -> tuple[Float[Tensor, "*head d_model out"], Float[Tensor, "*head out"] | None]:
    """Weight and bias that do on x C / scale what W, b do on the norm's output, in W's dtype."""
    # In float64: the only rounding left is the last one, back to the model's dtype.
    gain = norm.gain.double()
    folded = torch.empty_like(W, memory_format=torch.contiguous_format)
    bias = None if norm.bias is None else norm.bias.double()
    b64 = None if bias is None else W.new_zeros(*W.shape[:-2], W.shape[-1], dtype=torch.float64)
    columns = max(1, _CHUNK // (W.numel() // W.shape[-1]))
    for start in range(0, W.shape[-1], columns):
        part = W[..., start : start + columns].double()
        if b64 is not None:
            b64[..., start : start + columns] = bias @ part
        part = part * (gain * scale)[:, None]
        if centred:
            part -= part.mean(-2, keepdim=True)
        folded[..., start : start + columns] = part
    if b64 is None:
        return folded, b
    return folded, (b64 if b is None else b64 + b.double()).to(W.dtype)


def rescale_queries_and_keys(
    weights: MutableMapping[str, Tensor],
    block: str,
    ratio: float,
    bias: Float[Tensor, " d_model"] | None,
) -> None:
    """W_Q and W_K made to read a norm that divides by `ratio` times the constant, in place.

    So that queries, keys and values can share one norm: with r = ratio and a norm's gain a and
    bias b,  (x a + b) W + b_W  =  (x a / r + b) (r W) + [b_W + (1 - r) b W].
    A second call with 1 / ratio undoes it.
    """
    for leaf in ("Q", "K"):
        grouped = f"{block}.attn._W_{leaf}" in weights
        W_name, b_name = (f"{block}.attn.{'_' * grouped}{kind}_{leaf}" for kind in "Wb")
        W, b = weights[W_name].double(), weights[b_name]
        if bias is not None:
            weights[b_name] = (b.double() + (1 - ratio) * (bias.double() @ W)).to(b.dtype)
        weights[W_name] = (W * ratio).to(b.dtype)


def _scaled_outputs(norm: ConstantNorm, W: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    return (W.double() * norm.gain.double()).to(W.dtype)


def finished_model(
    cfg: HookedTransformerConfig,
    weights: MutableMapping[str, Tensor],
    norms: ConstantNorms,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    centred: bool,
    form: Form,
) -> HookedTransformer:
    """A model in one of the two finished forms.

    Args:
        cfg: Of the model with norms.
        weights: As for `fold_weights`.
        norms: As for `fold_weights`.
        tokenizer: Goes along.
        centred: As for `fold_weights`.
        form: `"folded"` or `"frozen"`.
    """
    kind = None if form == "folded" else "LNPre" if centred else "RMSPre"
    cfg = replace(
        cfg, normalization_type=kind, use_normalization_before_and_after=False, use_qk_norm=False
    )
    finished = fold_weights(weights, norms, centred, form)
    if form == "folded":
        return hooked_transformer(cfg, finished, tokenizer)
    scales = {"ln_final": norms["ln_final"].sigma}
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        scales[f"{block}.ln1"] = sigma_of(norms, block, "W_V")
        scales[f"{block}.ln2"] = sigma_of(norms, block, "W_in")
    return frozen_transformer(cfg, finished, scales, tokenizer)


def frozen_transformer(
    cfg: HookedTransformerConfig,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    scales: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase | None,
) -> HookedTransformer:
    """A stock model of type LNPre or RMSPre whose norms divide by constants.

    Args:
        cfg: With `normalization_type` `"LNPre"` or `"RMSPre"`.
        weights: Its weights as they are.
        scales: sigma by norm, `blocks.0.ln1`, `blocks.0.ln2`, ..., `ln_final`.
        tokenizer: Goes along.
    """
    model = hooked_transformer(cfg, {}, tokenizer, complete=False)
    for name, sigma in scales.items():
        norm = FrozenNorm(sigma, cfg.normalization_type == "LNPre", cfg.dtype)
        model.set_submodule(name, norm.to(cfg.device))
    model.setup()
    copy_weights(model, weights)
    return model.eval()


def is_frozen_form(model: HookedTransformer) -> bool:
    """Whether the model is in the frozen form: every norm module a `FrozenNorm`."""
    return isinstance(getattr(model, "ln_final", None), FrozenNorm)


def reads_mean(model: HookedTransformer) -> str | None:
    """The name of a weight that reads the mean of the residual stream, or None."""
    tolerance = _CENTRED.get(model.cfg.dtype, 1e-2)
    readers = {"W_Q": model.W_Q, "W_K": model.W_K, "W_V": model.W_V, "W_in": model.W_in}
    if model.cfg.gated_mlp:
        readers["W_gate"] = torch.stack([block.mlp.W_gate for block in model.blocks])
    for name, W in (readers | {"W_U": model.W_U}).items():
        if W.mean(-2).abs().max() > tolerance * W.abs().max():
            return name
    return None


def constant_norms(model: HookedTransformer) -> tuple[dict[str, ConstantNorm], bool]:
    """The constant norms of an LN-free model in any form, and whether they subtract the mean.

    A folded model has none left; it is described as dividing by one.

    Raises:
        NormSiteError: if a norm is live.
    """
    if not has_norm_sites(model):
        if model.cfg.normalization_type is None:
            names = ["ln_final"]
            blocks = range(model.cfg.n_layers)
            names += [f"blocks.{i}.{ln}" for i in blocks for ln in ("ln1", "ln2")]
            one = ConstantNorm(torch.ones(model.cfg.d_model, device=model.W_E.device), None, 1.0)
            return dict.fromkeys(names, one), reads_mean(model) is None
        if is_frozen_form(model):
            norms = {}
            for name, norm in model.named_modules():
                if isinstance(norm, FrozenNorm):
                    sigma = norm.sigma.item()
                    gain = torch.full_like(model.W_E[0], 1 / sigma, dtype=torch.float64)
                    norms[name] = ConstantNorm(gain, None, sigma)
            return norms, model.ln_final.centred
        raise NormSiteError(
            "nothing to fold: the model has no frozen norm sites; remove_norms(...).model has"
        )
    if live := live_sites(model):
        names = ", ".join(map(str, live[:4])) + (", ..." if len(live) > 4 else "")
        raise NormSiteError(f"{len(live)} norm sites are still live and cannot be folded: {names}")
    norms = {}
    for site in list_norm_sites(model):
        norm = get_norm(model, site)
        gain = norm.w.detach().double() / norm.sigma.double()
        norms[str(site)] = ConstantNorm(gain, norm.b.detach(), norm.sigma.item())
    return norms, True


def _weights_around_norms(model: HookedTransformer) -> dict[str, Tensor]:
    norm = (".ln", "ln_final", "_norm.")
    state = {k: v for k, v in model.state_dict().items() if not any(part in k for part in norm)}
    state.pop("unembed.W_E", None)  # present when tied
    state["unembed.W_U"] = model.W_U.detach()
    return state


def fold(model: HookedTransformer) -> HookedTransformer:
    """The same function as a stock `HookedTransformer` with `normalization_type=None`.

    Args:
        model: A model whose norms are all constant: `remove_norms(...).model`, or the frozen form.

    Returns:
        A new model with no class of this package in it. Its logits have been compared with the
        given model's on random tokens; `compare_logits` gives the number.

    Raises:
        NormSiteError: if a norm is still live, or there is none to fold.
        InexactError: if the logits differ by more than rounding in the model's dtype explains.
    """
    if model.cfg.normalization_type is None:
        raise NormSiteError("nothing to fold: the model has no norms")
    return _in_form(model, "folded", None)


def frozen_form(
    model: HookedTransformer, sigma: Mapping[str, float] | None = None
) -> HookedTransformer:
    """The same function in the form that TransformerLens' own tools understand, and are exact on.

    A stock `HookedTransformer` of type `"LNPre"` (`"RMSPre"` for a model that was freed from
    RMSNorms) in which every norm divides by a constant `hook_scale`. Where a tool divides by the
    cached scale, it now divides by a constant, which is no approximation.

    Args:
        model: An LN-free model: folded, or with frozen norm sites.
        sigma: The constants to show, by norm (`blocks.0.ln1`, `blocks.0.ln2`, `ln_final`). Any
            positive numbers are exact. Default: those the model knows; 1 for a folded one.

    Raises:
        NormSiteError: if a norm is still live, or sigma names a norm that the model does not have.
        InexactError: as `fold`.
    """
    return _in_form(model, "frozen", sigma)


def _in_form(
    model: HookedTransformer, form: Form, sigma: Mapping[str, float] | None
) -> HookedTransformer:
    norms, centred = constant_norms(model)
    if sigma:
        norms = with_sigma(norms, sigma)
    finished = finished_model(
        model.cfg,
        _weights_around_norms(model),
        norms,
        model.tokenizer,
        centred=centred,
        form=form,
    )
    compare_logits(finished, model).require(f"{form} against the given model's logits")
    return finished


def with_sigma(norms: ConstantNorms, sigma: Mapping[str, float]) -> dict[str, ConstantNorm]:
    """The same norms with other constants to show.

    Raises:
        NormSiteError: for a name that is not among them.
    """

    def whole(name: str) -> str:  # blocks.0.ln1.qk is a part of blocks.0.ln1
        return name.removesuffix(".qk").removesuffix(".v")

    if unknown := sorted(set(sigma) - set(norms) - {whole(name) for name in norms}):
        raise NormSiteError(f"no norm {unknown[0]!r}; the model's norms: {', '.join(norms)}")
    return {
        name: replace(norm, sigma=float(sigma.get(name, sigma.get(whole(name), norm.sigma))))
        for name, norm in norms.items()
    }
