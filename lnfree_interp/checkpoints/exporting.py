"""`HookedTransformer` -> a folder: for plain `transformers`, or in TransformerLens' own layout.

No class of transformers has an LN-free form, so an LN-free model wears the published disguise:
epsilon 1e12 and gains of 1e6 make every norm subtract the mean and multiply by a constant
(ApolloResearch/gpt2_noLN). Folded readers ignore the mean, so nothing changes.

The unembedding of a folded model is not the embedding any more. Where it is C diag(a) W_E^T, with a
bias beta W_E^T, it is tied again, and a and beta go into ln_f, as in the published checkpoints.
Otherwise the bias, for which there is no slot, rides on the direction that centring has emptied:
with ln_f's bias at 1 and b_U / d_model added to every row of W_U, ln_f's output x + 1 reads

    (x + 1) (W_U + 1 b_U / d)  =  x W_U + b_U          since  x 1 = 0  and  1 W_U = 0
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, PreTrainedModel

from lnfree_interp.checkpoints import native
from lnfree_interp.checkpoints.architectures import (
    ARCHITECTURES,
    Architecture,
    hf_config,
    logit_tolerance,
)
from lnfree_interp.checkpoints.layouts import hooked_names, optional_names, to_hf_weights
from lnfree_interp.checkpoints.model_card import model_card
from lnfree_interp.checkpoints.published import DISGUISE_EPSILON, DISGUISE_GAIN
from lnfree_interp.checkpoints.sidecar import Sidecar
from lnfree_interp.errors import NormSiteError, UnsupportedModelError
from lnfree_interp.files import new_folder
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.construct import original_tokenizer
from lnfree_interp.models.folding import ConstantNorm, rescale_queries_and_keys
from lnfree_interp.models.forms import constant_norms, is_frozen_form, reads_mean
from lnfree_interp.models.norm_conversions import CRMSNormPre
from lnfree_interp.models.sites import has_norm_sites, live_sites
from lnfree_interp.numerics import ROUNDING, MeasuredError

if TYPE_CHECKING:
    from lnfree_interp.removal.recipes import Recipe

Target = Literal["transformers", "transformer_lens"]


def to_transformers(model: HookedTransformer) -> PreTrainedModel:
    """The same logits as a model of `transformers`, of the class that the model came from.

    Args:
        model: With live norms, LN-free in the folded or the frozen form, or with norm sites that
            are all frozen (its gains then stay in the norms, and embeddings stay tied).

    Raises:
        UnsupportedModelError: for a model that the class cannot represent.
        NormSiteError: if some norm sites are live and some frozen.
        InexactError: if the logits differ by more than rounding explains.
    """
    return _in_transformers(model)[0]


def _in_transformers(model: HookedTransformer) -> tuple[PreTrainedModel, MeasuredError]:
    """As `to_transformers`, and how far its logits are from the model's."""
    cfg = model.cfg
    name = cfg.original_architecture
    said = is_frozen_form(model) or cfg.normalization_type in ("LN", "RMS", None)
    if name not in ARCHITECTURES or not said:
        raise UnsupportedModelError(
            f"transformers has no class for {name} with normalization_type="
            f"{cfg.normalization_type!r}: export it with target='transformer_lens'"
        )
    architecture = ARCHITECTURES[name]
    live = live_sites(model)
    if live and has_norm_sites(model):
        raise NormSiteError(
            f"{len(live)} norm sites are live: a model is exported before the removal or after it"
        )
    weights = _own_weights(model)
    others: dict[str, Any] = {}
    if not live:
        weights = _disguised(model, architecture, weights)
        others[architecture.config.fields.get("eps", "")] = DISGUISE_EPSILON
    elif model.b_U.any():
        raise UnsupportedModelError(f"{name} has no unembedding bias; this model has")
    weights.pop("unembed.b_U", None)
    optional = optional_names(architecture.layout, cfg)
    biased = any(weights[ours].any() for names in optional.values() for ours in names)
    if architecture.bias_field:
        others[architecture.bias_field] = biased
    absent = frozenset() if biased else frozenset(optional)
    state = to_hf_weights(architecture.layout, cfg, weights, absent)
    embedding = architecture.layout[0].hf
    tied = _is_tied(state["lm_head.weight"], model.W_E, architecture)
    if tied:  # one tensor, where the way back from a scaled embedding rounds
        state[embedding] = state["lm_head.weight"]
    tokenizer = None if model.tokenizer is None else original_tokenizer(model.tokenizer)
    config = hf_config(
        cfg,
        tie_word_embeddings=tied,
        **{
            name: getattr(tokenizer, name, None)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
        **others,
    )
    exported = AutoModelForCausalLM.from_config(config, dtype=cfg.dtype)
    exported.load_state_dict(state)
    exported.to(model.W_E.device).eval()
    error = compare_logits(exported, model)
    error.require(
        "exported against HookedTransformer logits",
        logit_tolerance(cfg.dtype, architecture, disguised=not live),
    )
    return exported, error


def _is_tied(
    W: Float[Tensor, "d_vocab d_model"],
    W_E: Float[Tensor, "d_vocab d_model"],
    architecture: Architecture,
) -> bool:
    """Whether an unembedding is the embedding; to rounding where that is a multiple of it."""
    if not architecture.scales_embedding:
        return torch.equal(W, W_E)
    few_ulp = 4 * torch.finfo(W.dtype).eps
    return torch.allclose(W * W_E.shape[1] ** 0.5, W_E, rtol=few_ulp, atol=0)


def export(
    model: HookedTransformer,
    out: str | os.PathLike[str],
    *,
    target: Target = "transformers",
    recipe: "Recipe | None" = None,
    sigma: Mapping[str, float] | None = None,
    errors: Mapping[str, MeasuredError] | None = None,
    source: str | None = None,
) -> Path:
    """Write a folder: weights as safetensors, config, tokenizer, model card and `lnfree.json`.

    Args:
        model: As for `to_transformers`; with target `"transformer_lens"`, any model but one with
            norm sites.
        out: A folder that does not exist yet or is empty. It appears when it is complete.
        target: `"transformers"`: a Hugging Face folder that plain `transformers` loads.
            `"transformer_lens"`: config and weights by TransformerLens' names, for what no class
            of transformers can hold; `load` reads both.
        recipe: How the norms were removed, for the model card.
        sigma: The constant of each norm (`blocks.0.ln1.v`, ...). Default: those the model holds.
        errors: Errors measured on the way, for the model card, by what was compared.
        source: What the model was made from, for the model card.

    Returns:
        The folder.

    Raises:
        OutputError: if the folder holds something.
        UnsupportedModelError, NormSiteError, InexactError: as `to_transformers`.
    """
    measured = dict(errors or {})
    if target not in get_args(Target):
        raise UnsupportedModelError(f"target {target!r} is none of {get_args(Target)}")
    if target == "transformers":
        exported, measured["export against HookedTransformer"] = _in_transformers(model)
    elif has_norm_sites(model):
        raise UnsupportedModelError(
            "norm sites have no place in TransformerLens' layout: fold or frozen_form first"
        )
    constants = _own_sigma(model) if sigma is None else _plain_sigma(sigma, model.cfg.n_layers)
    with new_folder(out) as folder:
        if target == "transformers":
            exported.save_pretrained(folder)
            if model.tokenizer is not None:
                original_tokenizer(model.tokenizer).save_pretrained(folder)
        else:
            native.write(model, folder)
            back, _ = native.read(folder, None, model.cfg.dtype, model.W_E.device, check=False)
            error = compare_logits(back, model)
            measured["export read back"] = error.require("what was written against the model")
        sidecar = _sidecar(model, recipe, constants, measured, source)
        sidecar.write(folder)
        (folder / "README.md").write_text(model_card(model.cfg, sidecar, target), encoding="utf-8")
    return Path(out)


def _sidecar(
    model: HookedTransformer,
    recipe: "Recipe | None",
    sigma: dict[str, float],
    errors: Mapping[str, MeasuredError],
    source: str | None,
) -> Sidecar:
    return Sidecar(
        form=form_of(model),
        sigma=sigma,
        epsilon=float(model.cfg.eps),
        recipe=None if recipe is None else _plain_recipe(recipe),
        errors={
            what: {
                "absolute": error.absolute,
                "relative": error.relative,
                "dtype": str(error.dtype).removeprefix("torch."),
            }
            for what, error in errors.items()
        },
        source=_public_name(source or model.cfg.model_name),
        made_by=f"lnfree_interp {version('lnfree_interp')}",
    )


def _public_name(source: str) -> str:
    """A hub id as it is; of a path on this machine only the last part."""
    local = os.path.isabs(source) or os.path.exists(source) or source.startswith((".", "~"))
    return Path(source).name if local else source


def _plain_sigma(sigma: Mapping[str, float], n_layers: int) -> dict[str, float]:
    """Constants as plain numbers, positive and finite, of norms or sites that there can be."""
    kinds = ("ln1", "ln1.qk", "ln1.v", "ln2")
    names = {"ln_final", *(f"blocks.{i}.{kind}" for i in range(n_layers) for kind in kinds)}
    if unknown := sorted(set(sigma) - names):
        raise NormSiteError(f"sigma names {unknown[0]}, which the model does not have")
    try:
        plain = {name: float(value) for name, value in sigma.items()}
    except (TypeError, ValueError) as error:
        raise NormSiteError(f"sigma must be one number for each norm: {error}") from error
    if bad := [name for name, value in plain.items() if not 0 < value < float("inf")]:
        raise NormSiteError(f"sigma of {bad[0]} is {plain[bad[0]]}, not positive and finite")
    return plain


def best_target(model: HookedTransformer) -> Target:
    """The layout that can hold a model: transformers where it has a class for it."""
    architecture = ARCHITECTURES.get(model.cfg.original_architecture or "")
    form = form_of(model)
    if architecture is None or form in ("rms", "crms"):
        return "transformer_lens"
    if form != "live" and architecture.fixed_epsilon:
        return "transformer_lens"
    places = hooked_names(architecture.layout, model.cfg) | {"unembed.b_U"}
    homeless = (W for name, W in _own_weights(model).items() if name not in places)
    return "transformer_lens" if any(W.any() for W in homeless) else "transformers"


def form_of(model: HookedTransformer) -> str:
    """In one word what a model is: live, sites, folded, frozen, rms or crms."""
    kind = model.cfg.normalization_type
    if has_norm_sites(model):
        return "live" if live_sites(model) else "sites"
    if kind is None:
        return "folded"
    if is_frozen_form(model):
        return "frozen"
    if isinstance(model.ln_final, CRMSNormPre):
        return "crms"
    return "rms" if kind == "RMSPre" else "live"


def _plain_recipe(recipe: "Recipe") -> dict[str, Any]:
    fields = asdict(recipe)
    fields["events"] = [[event.step, str(event.site)] for event in recipe.events]
    return fields


def _own_sigma(model: HookedTransformer) -> dict[str, float]:
    if live_sites(model) or model.cfg.normalization_type is None:
        return {}
    return {name: norm.sigma for name, norm in constant_norms(model)[0].items()}


def _own_weights(model: HookedTransformer) -> dict[str, Tensor]:
    """By TransformerLens' names; tied or not, split or not."""
    renamed = {}
    for name, W in model.named_parameters(remove_duplicate=False):
        if ".ln1.v." not in name and name != "unembed.W_E":
            renamed[name.replace(".ln1.qk.", ".ln1.")] = W.detach()
    renamed["unembed.W_U"] = model.W_U.detach()
    renamed["unembed.b_U"] = model.b_U.detach()
    return renamed


def _disguised(
    model: HookedTransformer, architecture: Architecture, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of an LN-free model with constant norms that transformers can run."""
    cfg, name = model.cfg, model.cfg.original_architecture
    if architecture.fixed_epsilon:
        raise UnsupportedModelError(
            f"{name} has its epsilon in the code, not in the config: an LN-free model cannot be "
            "exported to it; use target='transformer_lens'"
        )
    if cfg.dtype == torch.float16:
        raise UnsupportedModelError(
            "float16 ends at 65504, the exported gains are 1e6: use float32"
        )
    norms, _ = constant_norms(model)
    centres = architecture.centres
    sites = has_norm_sites(model)  # then gains and biases are still in the norms
    if centres and not sites and (reader := reads_mean(model)):
        raise UnsupportedModelError(
            f"{reader} reads the mean of the residual stream, which {name}'s LayerNorm subtracts: "
            "only models folded from LayerNorm can be exported to it"
        )
    weights = {key: W for key, W in weights.items() if not key.startswith("ln_final.")}
    W_E, places = weights["embed.W_E"], architecture.norm_weights(cfg)
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        qk, v = norms.get(f"{block}.ln1.qk"), norms.get(f"{block}.ln1.v")
        if qk is not None and v is not None and qk.sigma != v.sigma:
            rescale_queries_and_keys(weights, block, v.sigma / qk.sigma, v.bias)
        for kind in ("ln1", "ln2", "ln1_post", "ln2_post", "attn.q_norm", "attn.k_norm"):
            if f"{block}.{kind}.w" not in places:
                continue
            norm = norms.get(f"{block}.{kind}") or norms.get(f"{block}.{kind}.v")
            _put(weights, f"{block}.{kind}", norm, W_E, places)
    final = norms["ln_final"]
    if not sites:
        final, weights["unembed.W_U"] = _unembedding(model, final, architecture)
    elif model.b_U.any():
        raise UnsupportedModelError(f"{name} has no unembedding bias: fold the model first")
    _put(weights, "ln_final", final, W_E, places)
    return weights


def _put(
    weights: dict[str, Tensor],
    name: str,
    norm: ConstantNorm | None,
    like: Tensor,
    places: Mapping[str, int],
) -> None:
    """Gain and bias of a constant norm, as they stand behind an epsilon of 1e12."""
    gain = torch.ones(places[f"{name}.w"]) if norm is None else norm.gain
    weights[f"{name}.w"] = (gain.double().to(like.device) * DISGUISE_GAIN).to(like.dtype)
    if f"{name}.b" in places:
        bias = None if norm is None else norm.bias
        weights[f"{name}.b"] = (torch.zeros_like(gain) if bias is None else bias).to(like)


def _unembedding(
    model: HookedTransformer, final: ConstantNorm, architecture: Architecture
) -> tuple[ConstantNorm, Float[Tensor, "d_model d_vocab"]]:
    """The final norm and W_U of a model whose final norm is folded: tied if that is exact."""
    scale = final.gain.mean().item()  # 1 / sigma in the frozen form, 1 in the folded
    W_E = model.W_E / (model.cfg.d_model**0.5 if architecture.scales_embedding else 1)
    tie = retied(W_E, model.W_U * scale, model.b_U, architecture.centres)
    if tie is not None:
        gain, bias = tie
        return ConstantNorm(gain, bias, final.sigma), W_E.T
    if not model.b_U.any():
        return final, model.W_U.detach()
    if not architecture.centres:
        raise UnsupportedModelError(
            f"{model.cfg.original_architecture} has no unembedding bias; this model has"
        )
    # A bias of the size of the gain keeps the added rows at the size of W_U.
    bias = torch.full_like(final.gain, scale)
    W_U = model.W_U.double() + model.b_U.double() / (scale * model.cfg.d_model)
    return ConstantNorm(final.gain, bias, final.sigma), W_U.to(model.W_U.dtype).detach()


def retied(
    W_E: Float[Tensor, "d_vocab d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"],
    centred: bool,
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"] | None] | None:
    """Gain a and bias beta with W_U = C diag(a) W_E^T and b_U = W_E beta, if there are any.

    The least squares solution, in float64; None unless it reproduces W_U and b_U to rounding.

    Args:
        W_E: Embedding.
        W_U: Unembedding behind a norm without gain and bias.
        b_U: Its bias.
        centred: Whether C subtracts the mean (LayerNorm), or is the identity (RMSNorm).
    """
    E, U, d = W_E.detach().double(), W_U.detach().double(), W_E.shape[1]
    tolerance = ROUNDING[W_E.dtype]
    gram = E.T @ E
    C = torch.eye(d, dtype=E.dtype, device=E.device)
    if centred:
        C -= 1 / d
    try:
        gain = torch.linalg.solve(gram * C, (U * E.T).sum(-1))
        bias = torch.linalg.solve(gram, E.T @ b_U.detach().double()) if b_U.any() else None
    except torch.linalg.LinAlgError:
        return None
    if not centred and bias is not None:
        return None  # RMSNorm has no bias
    for start in range(0, len(E), 4096):
        rows = slice(start, start + 4096)
        scaled = E[rows] * gain
        if centred:
            scaled = scaled - scaled.mean(-1, keepdim=True)
        if (scaled - U[:, rows].T).abs().max() > tolerance * U.abs().max():
            return None
    if bias is not None and (E @ bias - b_U.double()).abs().max() > tolerance * b_U.abs().max():
        return None
    return gain, bias
