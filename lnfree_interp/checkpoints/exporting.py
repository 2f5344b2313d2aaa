"""`HookedTransformer` -> a folder: for plain `transformers`, or in TransformerLens' own layout."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, PreTrainedModel

from lnfree_interp.checkpoints import adapter, native
from lnfree_interp.checkpoints.architectures import (
    ARCHITECTURES,
    hf_config,
    logit_tolerance,
)
from lnfree_interp.checkpoints.constant_epsilon import constant_epsilon_weights, is_tied
from lnfree_interp.checkpoints.layouts import hooked_names, optional_names, to_hf_weights
from lnfree_interp.checkpoints.loading import load_checkpoint
from lnfree_interp.checkpoints.model_card import model_card
from lnfree_interp.checkpoints.published import CONSTANT_EPSILON
from lnfree_interp.checkpoints.sidecar import Sidecar
from lnfree_interp.errors import NormSiteError, UnsupportedModelError
from lnfree_interp.files import new_folder
from lnfree_interp.models.agreement import origin_of, require_same_logits
from lnfree_interp.models.construct import original_tokenizer
from lnfree_interp.models.crms import is_crms
from lnfree_interp.models.forms import epsilon_of, reads_mean
from lnfree_interp.models.inserting import varied
from lnfree_interp.models.linear_attention import linear_layers
from lnfree_interp.models.running import require_hooked
from lnfree_interp.models.site_names import whole_norm
from lnfree_interp.models.sites import (
    first_constants,
    has_norm_sites,
    is_frozen_form,
    list_norm_sites,
    live_sites,
    norm_at,
    sites_of,
    stock_weights,
)
from lnfree_interp.numerics import MeasuredError

if TYPE_CHECKING:
    from lnfree_interp.removal.recipes import Recipe

Target = Literal["transformers", "transformer_lens"]


def to_transformers(model: HookedTransformer) -> PreTrainedModel:
    """The same logits as a model of `transformers`, of the class that the model came from.

    Args:
        model: With live norms, LN-free in the folded or the frozen form, or with norm sites that
            are all live or all frozen (its gains stay in the norms, and embeddings tied).

    Returns:
        A model of `transformers`; its logits have been compared with the given model's on random
            tokens.

    Raises:
        UnsupportedModelError: for a model that the class cannot represent.
        NormSiteError: if some norm sites are live and some frozen.
        InexactError: if the logits differ by more than rounding explains.

    Examples:
        >>> type(lf.formats.to_transformers(free)).__name__
        'GPT2LMHeadModel'
    """
    return _in_transformers(model)[0]


def _in_transformers(model: HookedTransformer) -> tuple[PreTrainedModel, MeasuredError]:
    """The model of transformers, and how far its logits are from the given model's."""
    cfg = model.cfg
    name = cfg.original_architecture
    said = is_frozen_form(model) or cfg.normalization_type in ("LN", "RMS", None)
    if name not in ARCHITECTURES or not said:
        raise UnsupportedModelError(
            f"transformers has no class for {name} with normalization_type="
            f"{cfg.normalization_type!r}: export it with target='transformer_lens'"
        )
    if what := varied(model):
        raise UnsupportedModelError(
            f"transformers has no class for {name} in which {what}: export it with "
            f"target='transformer_lens'{'' if linear_layers(model) else _OR_FOLDED}"
        )
    architecture = ARCHITECTURES[name]
    live = live_sites(model)
    if live and has_norm_sites(model) and len(live) < len(list_norm_sites(model)):
        raise NormSiteError(
            f"{len(live)} of {len(list_norm_sites(model))} norm sites are live, which no class of "
            "transformers can hold: export it with target='transformer_lens', or freeze them too"
        )
    if firsts := [*first_constants(model)]:
        raise UnsupportedModelError(
            f"{firsts[0]} and {len(firsts) - 1} more divide the first token of a prompt by a "
            "constant of its own, which no class of transformers can hold: export the model with "
            "target='transformer_lens'"
        )
    weights = stock_weights(model)
    others: dict[str, Any] = {}
    if not live:
        weights = constant_epsilon_weights(model, architecture, weights)
        others[architecture.config.fields["eps"]] = CONSTANT_EPSILON
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
    tied = is_tied(state["lm_head.weight"], model.W_E, architecture)
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
    error = require_same_logits(
        exported,
        model,
        "exported against HookedTransformer logits",
        logit_tolerance(cfg.dtype, architecture, constant_epsilon=not live),
    )
    return exported, error


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
        model: With live norms, LN-free in the folded or the frozen form, or with norm sites that
            are all frozen; with target `"transformer_lens"`, in any form: norm sites of which some
            are frozen, and constants of first tokens.
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
        OutputError: if the folder holds something, or cannot be written.
        NormSiteError: if some norm sites are live and some frozen, which needs target
            `"transformer_lens"`, if one is between the two, or if sigma names a norm that the
            model does not have, or is not positive and finite.
        UnsupportedModelError: for a model that the target cannot hold.
        InexactError: if the logits differ by more than rounding explains.

    Examples:
        >>> folder = lf.export(free, "my-lnfree-gpt2", source="bundled")
        >>> lf.compare_logits(lf.load(folder), free, tokens).relative < 1e-5
        True
        >>> lf.formats.read_sidecar(folder).form
        'folded'
    """
    require_hooked(model)
    measured = dict(errors or {})
    if target not in get_args(Target):
        raise UnsupportedModelError(
            f"target={target!r} does not exist: pass {' or '.join(map(repr, get_args(Target)))}"
        )
    exported = None
    if target == "transformers":
        exported, measured["export against HookedTransformer"] = _in_transformers(model)
    constants = _own_sigma(model) if sigma is None else _plain_sigma(sigma, model)
    with new_folder(out) as folder:
        if exported is not None:
            exported.save_pretrained(folder)
            if model.tokenizer is not None:
                original_tokenizer(model.tokenizer).save_pretrained(folder)
        else:
            native.write(model, folder)
            back, _ = native.read(folder, None, model.cfg.dtype, model.W_E.device, check=False)
            measured["export read back"] = require_same_logits(
                back, model, "what was written against the model"
            )
        sidecar = _sidecar(model, recipe, constants, measured, source)
        sidecar.write(folder)
        (folder / "README.md").write_text(model_card(model.cfg, sidecar, target), encoding="utf-8")
    return Path(out)


def export_adapter(
    model: HookedTransformer,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    revision: str | None = None,
) -> Path:
    """Write what training changed of a base: a small folder that `load` puts back.

    Args:
        model: As a run left it, `run.model`: its norms live, frozen or some of them. `fold` is for
            after loading; it changes every weight.
        out: A folder that does not exist yet or is empty.
        base: What the model was trained from, as `load` reads it: a hub id, or a path, which
            `load(..., base=...)` can replace where it is another.
        revision: Branch, tag or commit of the base on the hub.

    Returns:
        The folder, with `adapter.safetensors` and `lnfree_adapter.json`.

    Raises:
        UnsupportedModelError: if the model has other norms or tensors than the base.
        NormSiteError: if a norm site is between live and frozen.
        OutputError: if the folder holds something, or cannot be written.
        CheckpointError: if the base cannot be read.
        InexactError: if the logits of what was written differ by more than rounding explains.

    Source:
        Ours; as small as what `Recipe.trainable` chose (arXiv 2403.20284).

    Examples:
        >>> from dataclasses import replace
        >>> recipe = replace(lf.recipes.finetuning(steps=2, batch=2), trainable="norms")
        >>> run = lf.finetune(lf.load(lf.bundled_checkpoint()), recipe, tokens, progress=False)
        >>> folder = lf.export_adapter(run.model, "norms", lf.bundled_checkpoint())
        >>> lf.compare_logits(lf.load(folder), run.model, tokens).relative < 1e-5
        True
    """
    require_hooked(model)
    below, form = base_below(model, base, revision)
    with new_folder(out) as folder:
        adapter.write(model, below, os.fspath(base), revision, form, folder)
        where = {"dtype": model.cfg.dtype, "device": model.W_E.device}
        back = load_checkpoint(folder, check=False, **where).model
        require_same_logits(back, model, "what was written against the model")
    return Path(out)


def base_below(
    model: HookedTransformer, base: str | os.PathLike[str], revision: str | None
) -> tuple[HookedTransformer, Literal["sites"] | None]:
    """The model that an adapter changes, in the model's dtype, and the form in which it is loaded.

    Raises:
        CheckpointError: if it cannot be read.
    """
    name, where = os.fspath(base), {"dtype": model.cfg.dtype, "device": model.W_E.device}
    below = load_checkpoint(name, revision=revision, check=False, **where).model
    if not has_norm_sites(model) or below.cfg.normalization_type is not None:
        return below, None
    sited = load_checkpoint(name, revision=revision, form="sites", check=False, **where).model
    return sited, "sites"


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
        sigma_first=first_constants(model),
        epsilon=epsilon_of(model),
        recipe=None if recipe is None else recipe.to_json(),
        errors={
            what: {
                "absolute": error.absolute,
                "relative": error.relative,
                "dtype": str(error.dtype).removeprefix("torch."),
            }
            for what, error in errors.items()
        },
        source=_public_name(source or model.cfg.model_name),
        weights=origin_of(model),
        made_by=f"lnfree_interp {version('lnfree_interp')}",
    )


def _public_name(source: str) -> str:
    """A hub id unchanged, or the last part of a path on this machine."""
    local = os.path.isabs(source) or os.path.exists(source) or source.startswith((".", "~"))
    return Path(source).name if local else source


def _plain_sigma(sigma: Mapping[str, float], model: HookedTransformer) -> dict[str, float]:
    """Constants as plain numbers, positive and finite, of norms or sites of the model."""
    sites = set(map(str, sites_of(model.cfg))) | set(map(str, list_norm_sites(model)))
    names = sites | set(map(whole_norm, sites))
    if unknown := sorted(set(sigma) - names):
        raise NormSiteError(
            f"sigma names {unknown[0]}, which the model does not have; list_norm_sites(model) "
            "names its norms"
        )
    try:
        plain = {name: float(value) for name, value in sigma.items()}
    except (TypeError, ValueError) as error:
        raise NormSiteError(f"sigma must be one number for each norm: {error}") from error
    if bad := [name for name, value in plain.items() if not 0 < value < float("inf")]:
        raise NormSiteError(f"sigma of {bad[0]} is {plain[bad[0]]}, not positive and finite")
    return plain


_OR_FOLDED = "; or fold it once its norms are removed"


def best_target(model: HookedTransformer) -> Target:
    """The layout that can hold a model: that of transformers if it has a class for it."""
    architecture = ARCHITECTURES.get(model.cfg.original_architecture or "")
    form = form_of(model)
    if architecture is None or form in ("rms", "crms", "partial"):
        return "transformer_lens"
    if varied(model) or first_constants(model):
        return "transformer_lens"
    if form != "live" and architecture.fixed_epsilon:
        return "transformer_lens"
    if form in ("folded", "frozen") and architecture.centres and reads_mean(model):
        return "transformer_lens"  # norms there would subtract it
    places = hooked_names(architecture.layout, model.cfg) | {"unembed.b_U"}
    left_over = (W for name, W in stock_weights(model).items() if name not in places)
    return "transformer_lens" if any(W.any() for W in left_over) else "transformers"


def form_of(model: HookedTransformer) -> str:
    """Which form a model is in: live, partial, sites, folded, frozen, rms or crms."""
    kind = model.cfg.normalization_type
    if has_norm_sites(model):
        live, every = len(live_sites(model)), len(list_norm_sites(model))
        return "sites" if live == 0 else "live" if live == every else "partial"
    if kind is None:
        return "folded"
    if is_frozen_form(model):
        return "frozen"
    if is_crms(model):
        return "crms"
    return "rms" if kind == "RMSPre" else "live"


def _own_sigma(model: HookedTransformer) -> dict[str, float]:
    scales = {str(site): norm_at(model, site).scale for site in list_norm_sites(model)}
    return {name: scale for name, scale in scales.items() if scale is not None}
