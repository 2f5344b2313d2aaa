"""A `HookedTransformer` as a folder in TransformerLens' own names.

For models that no class of transformers can hold: other norms, norms of which some are frozen and
some live, constants of first tokens, the frozen form, biases that the architecture does not have.
`hooked_transformer.json` holds the `HookedTransformerConfig`, the kind of norm, and a few logits by
which a damaged folder is noticed; the weights are in `model.safetensors`, the tokenizer is in files
of its own.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerBase

from lnfree_interp.checkpoints.hub import TOKENIZER_FILES, first_line
from lnfree_interp.checkpoints.layouts import is_finite
from lnfree_interp.checkpoints.source import read_tokenizer, weight_shapes
from lnfree_interp.errors import CheckpointError, NormSiteError
from lnfree_interp.models.agreement import logits_of, random_tokens
from lnfree_interp.models.construct import copy_weights, hooked_transformer, original_tokenizer
from lnfree_interp.models.crms import install_crms, is_crms
from lnfree_interp.models.forms import epsilon_of, frozen_transformer
from lnfree_interp.models.inserting import lay_out, layout_of, varied
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.models.sites import (
    freeze_site,
    has_norm_sites,
    list_norm_sites,
    norm_at,
    sites_of,
    split_norms,
    stock_weights,
)
from lnfree_interp.numerics import TOLERANCE, MeasuredError, measure_error

CONFIG = "hooked_transformer.json"
_VERSION = 1

# Settings of this machine, and fields that make TransformerLens download or run something.
_NOT_SAVED = (
    "dtype",
    "device",
    "n_devices",
    "seed",
    "init_weights",
    "tokenizer_name",
    "trust_remote_code",
    "load_in_4bit",
    "quantization_method",
)

_SAMPLED_LOGITS = 64
"""How many logits of the last of 16 random tokens are stored with a model, to recognise it by."""


def is_native(path: Path) -> bool:
    """Whether a folder was written by `write`."""
    return (path / CONFIG).is_file()


def write(model: HookedTransformer, folder: Path) -> None:
    """Write config, weights and tokenizer into an existing folder.

    Args:
        model: In any form.
        folder: The folder to write into.

    Raises:
        NormSiteError: if a norm site is between live and frozen.
    """
    cfg = {name: _plain(value) for name, value in model.cfg.to_dict().items()}
    cfg["model_name"] = Path(str(cfg["model_name"])).name
    cfg["eps"] = epsilon_of(model)
    content: dict[str, Any] = {
        "version": _VERSION,
        "config": {name: value for name, value in cfg.items() if name not in _NOT_SAVED},
        **constants_of(model),
        "sites": has_norm_sites(model),
        **({"layout": layout_of(model)} if varied(model) else {}),
        "crms": is_crms(model),
        **sample_of(model),
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    weights = {name: W.contiguous().cpu() for name, W in stock_weights(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if model.tokenizer is not None:
        original_tokenizer(model.tokenizer).save_pretrained(folder)


def read(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    check: bool = True,
) -> tuple[HookedTransformer, MeasuredError | None]:
    """Read a folder that `write` made, and compare the model's logits with the stored ones.

    Raises:
        CheckpointError: if a file is missing, damaged, or does not fit the others.
        InexactError: if the logits are not those of the model that was written.
    """
    file = folder / CONFIG
    cfg, content = read_cfg(folder, dtype, device)
    try:
        frozen = {name: float(sigma) for name, sigma in content["frozen"].items()}
        firsts = {name: float(sigma) for name, sigma in content.get("frozen_first", {}).items()}
        sample = read_sample(content)
        crms, sited = content["crms"] is True, content.get("sites") is True
        layout = {name: dict(found) for name, found in content.get("layout", {}).items()}
    except Exception as error:  # whatever a wrong value leads to
        raise CheckpointError(f"{file}: cannot be read: {first_line(error):.100}") from error
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors")
    shapes = weight_shapes(weights)
    _require_fitting(cfg, shapes, file)
    norms = {str(site) for site in sites_of(cfg, whole_ln1=not sited)}
    norms |= {name for name, found in layout.items() if "map" in found}
    if sited and (unknown := sorted(frozen.keys() - norms)):
        raise CheckpointError(f"{file}: frozen names {unknown[0]}, which the config does not have")
    if not sited and frozen and frozen.keys() != norms:
        raise CheckpointError(
            f"{file}: frozen names {len(frozen)} norms, the config has {len(norms)}: it must name "
            "every one, or none"
        )
    if unknown := sorted(firsts.keys() - frozen.keys()):
        raise CheckpointError(f"{file}: frozen_first names {unknown[0]}, which is not frozen")
    if tokenizer is None and any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = read_tokenizer(folder)
    with safe_open(weights, framework="pt", device=str(device)) as opened:
        written = opened.get_tensor("embed.W_E").dtype
        pairs = ((name, _checked(opened.get_tensor(name), name, weights)) for name in shapes)
        if frozen and not sited:
            model = frozen_transformer(cfg, {}, frozen, tokenizer, firsts=firsts, complete=False)
        else:
            model = hooked_transformer(cfg, {}, tokenizer, complete=False)
        if crms:
            install_crms(model)
        if layout:
            model = _laid_out(model, layout, dict(pairs), file)
        else:
            copy_weights(model, pairs, zero_biases=False)
    if sited:
        model = model if layout else split_norms(model, copy_weights=False)
        for site, sigma in frozen.items():
            freeze_site(model, site, sigma, first=firsts.get(site))
    if not check:
        return model.eval(), None
    return model, require_sample(model.eval(), sample, written, str(folder))


def saved_live_sites(folder: Path, cfg: HookedTransformerConfig) -> tuple[NormSite, ...] | None:
    """The live norm sites of a model that was written with its sites; None for any other.

    Args:
        folder: In TransformerLens' layout.
        cfg: Its config, for a model whose norms stand where the config says.

    Raises:
        CheckpointError: if the layout cannot be read.
    """
    file = folder / CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("sites") is not True:
            return None
        return tuple(s for s in saved_sites(folder, cfg) if str(s) not in content["frozen"])
    except (NormSiteError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: layout: {first_line(error):.200}") from error


def saved_sites(folder: Path, cfg: HookedTransformerConfig) -> tuple[NormSite, ...]:
    """All norm sites of a model, live or frozen, in the order of computation."""
    layout = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("layout", {})
    names = [name for name, found in layout.items() if "map" in found]
    every = map(NormSite.parse, names) if layout else sites_of(cfg)
    return tuple(sorted(every, key=lambda site: site.order))


def _laid_out(
    model: HookedTransformer,
    layout: Mapping[str, Mapping[str, Any]],
    weights: dict[str, torch.Tensor],
    file: Path,
) -> HookedTransformer:
    """A model with norm sites whose norms are not those of its config, with its weights.

    Raises:
        CheckpointError: if the layout is not one, or the weights are not its.
    """
    stock = dict(model.named_parameters(remove_duplicate=False))
    without_bias = {name: torch.zeros_like(W) for name, W in stock.items() if name.endswith(".b")}
    given = {name: W for name, W in weights.items() if name in stock}
    copy_weights(model, without_bias | given)
    model = split_norms(model, copy_weights=False)
    try:
        lay_out(model, layout)
    except (NormSiteError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: layout: {first_line(error):.200}") from error
    places = stock_weights(model)
    if wrong := sorted(weights.keys() ^ places.keys()):
        has = "the layout" if wrong[0] in places else "the weights"
        raise CheckpointError(f"{file}: only {has} have {wrong[0]}")
    for name in weights.keys() - stock.keys():
        if places[name].shape != weights[name].shape:
            raise CheckpointError(
                f"{file}: {name} is {list(weights[name].shape)}, the layout says "
                f"{list(places[name].shape)}"
            )
        places[name].copy_(weights[name])
    return model


def read_cfg(
    folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[HookedTransformerConfig, dict[str, Any]]:
    """The config of a folder that `write` made, and all that stands beside it.

    Raises:
        CheckpointError: if it cannot be read.
    """
    file = folder / CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise CheckpointError(
                f"{file}: version {content['version']}; this package reads version {_VERSION}"
            )
        known = {field.name for field in fields(HookedTransformerConfig)} - set(_NOT_SAVED)
        if unknown := sorted(set(content["config"]) - known):
            raise CheckpointError(f"{file}: unknown field {unknown[0]}")
        cfg = HookedTransformerConfig(
            **content["config"], dtype=dtype, device=str(device), init_weights=False
        )
        if not 0 < cfg.eps < 1e30:
            raise CheckpointError(f"{file}: eps={cfg.eps}, and it must be a positive number")
    except CheckpointError:
        raise
    except Exception as error:  # TransformerLens raises many types for a wrong value
        raise CheckpointError(f"{file}: cannot be read: {first_line(error):.100}") from error
    return cfg, content


def constants_of(model: HookedTransformer) -> dict[str, dict[str, float]]:
    """The constants of frozen norms by site, and those of first tokens, as they are stored.

    Raises:
        NormSiteError: if a norm site is between live and frozen.
    """
    norms = {str(site): norm_at(model, site) for site in list_norm_sites(model)}
    frozen = {name: norm for name, norm in norms.items() if norm.affine}
    if between := [n for n, norm in norms.items() if norm.scale is not None and n not in frozen]:
        raise NormSiteError(
            f"{between[0]} is between live and frozen: a run in progress keeps it in its "
            "checkpoints; freeze it to export the model"
        )
    return {
        "frozen": {name: norm.scale for name, norm in frozen.items() if norm.scale is not None},
        "frozen_first": {n: norm.first for n, norm in frozen.items() if norm.first is not None},
    }


def sample_of(model: HookedTransformer) -> dict[str, list[Any]]:
    """Random tokens and some of their logits, which are stored with a model to recognise it by."""
    tokens = random_tokens(model, batch=1, pos=16)
    return {"tokens": tokens.tolist(), "logits": _logits(model, tokens).tolist()}


def read_sample(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What `sample_of` stored; whatever error a wrong value leads to."""
    return {
        "tokens": torch.tensor(content["tokens"]),
        "logits": torch.tensor(content["logits"], dtype=torch.float64),
    }


def require_sample(
    model: HookedTransformer, sample: Mapping[str, torch.Tensor], written: torch.dtype, where: str
) -> MeasuredError:
    """Compare a model's logits with those that `sample_of` stored.

    Args:
        model: As it was read.
        sample: What is stored, from `read_sample`.
        written: The dtype of the weights in the file.
        where: The folder, for the message.

    Raises:
        InexactError: if they differ by more than rounding explains.
    """
    dtype = model.cfg.dtype
    found = _logits(model, sample["tokens"])
    error = measure_error(found.to(dtype), sample["logits"].to(dtype))
    error.require(
        f"{where}: logits against those of the model that was written",
        max(TOLERANCE[dtype], TOLERANCE.get(written, 0.0)),
    )
    return error


def _logits(model: HookedTransformer, tokens: torch.Tensor) -> torch.Tensor:
    return logits_of(model, tokens)[0, -1, :_SAMPLED_LOGITS].double().cpu()


def _require_fitting(
    cfg: HookedTransformerConfig, shapes: dict[str, list[int]], file: Path
) -> None:
    """Refuse a config whose sizes are not those of the weights, before a model is built."""
    grouped = cfg.n_key_value_heads is not None
    expected: dict[str, list[int | None]] = {
        "embed.W_E": [cfg.d_vocab, cfg.d_model],
        "unembed.W_U": [cfg.d_model, cfg.d_vocab_out],
        "blocks.0.attn.W_Q": [cfg.n_heads, cfg.d_model, cfg.d_head],
        "blocks.0.attn._W_K" if grouped else "blocks.0.attn.W_K": [
            cfg.n_key_value_heads or cfg.n_heads,
            cfg.d_model,
            cfg.d_head,
        ],
    }
    if not cfg.attn_only:
        expected["blocks.0.mlp.W_in"] = [cfg.d_model, cfg.d_mlp]
    if cfg.positional_embedding_type == "standard":
        expected["pos_embed.W_pos"] = [cfg.n_ctx, cfg.d_model]
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise CheckpointError(f"{file}: {name} is {shapes.get(name)}, the config says {shape}")
    last = f"blocks.{cfg.n_layers - 1}."
    if not any(name.startswith(last) for name in shapes):
        raise CheckpointError(
            f"{file}: n_layers={cfg.n_layers}, but the weights hold nothing for {last[:-1]}"
        )


def _checked(W: torch.Tensor, name: str, file: Path) -> torch.Tensor:
    if not W.is_floating_point():
        raise CheckpointError(f"{file}: {name} holds whole numbers, and a weight must be floating")
    if not is_finite(W):
        raise CheckpointError(f"{file}: {name} holds values that are not finite")
    return W


def _plain(value: Any) -> Any:
    """A value for JSON: numpy numbers become Python's."""
    return value.item() if hasattr(value, "item") else value
