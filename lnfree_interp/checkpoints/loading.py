"""A checkpoint -> `HookedTransformer`, whose logits are compared with those of transformers."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lnfree_interp.checkpoints import adapter, native, published
from lnfree_interp.checkpoints.architectures import (
    architecture_of,
    hooked_config,
    logit_tolerance,
)
from lnfree_interp.checkpoints.hub import first_line, is_gguf
from lnfree_interp.checkpoints.layouts import to_hooked_weights
from lnfree_interp.checkpoints.sidecar import read_sidecar
from lnfree_interp.checkpoints.source import (
    OpenCheckpoint,
    Sigma,
    locate,
    open_checkpoint,
    read_config,
)
from lnfree_interp.errors import CheckpointError, NormSiteError, UnsupportedModelError
from lnfree_interp.models.agreement import (
    logits_of,
    measured_agreement,
    origin_of,
    random_tokens,
    record_agreement,
    record_origin,
)
from lnfree_interp.models.construct import hooked_transformer
from lnfree_interp.models.folding import ConstantNorms, Form, rescale_queries_and_keys
from lnfree_interp.models.forms import finished_model, fold, frozen_form
from lnfree_interp.models.site_names import NormSite, whole_norm
from lnfree_interp.models.sites import freeze_site, has_norm_sites, sites_of, split_norms
from lnfree_interp.numerics import LNFREE_EPSILON, TOLERANCE, MeasuredError, measure_error

CHECK_TOKENS = 128
"""Random tokens in each of the two rows on which logits are compared."""

_FORMS = ("folded", "frozen", "sites")

LIVE_EPSILON = 1e-5
"""What a norm adds to the variance when it is thawed and the checkpoint does not say: GPT-2's."""


def load(
    source: str | os.PathLike[str] | PreTrainedModel,
    *,
    form: Form | Literal["sites"] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    sigma: Sigma | None = None,
    base: str | os.PathLike[str] | None = None,
    bank: str | None = None,
    check: bool = True,
) -> HookedTransformer:
    """A checkpoint as a stock `HookedTransformer`, its logits compared with transformers'.

    Live norms stay live and weights unprocessed. A published LN-free checkpoint is recognised from
    its content, and its norms folded. Quantised weights (GGUF) are dequantised; what is exported of
    the model says so. An adapter of `lf.export_adapter` is put back into its base, and so is a
    bank of `lf.NormBanks`.

    Args:
        source: Hub id, local folder, a `model.gguf` (or a folder whose only weights it is), a
            nanoGPT `ckpt.pt`, or a `transformers` model in memory.
        form: For LN-free checkpoints. `"folded"` is a stock model with `normalization_type=None`;
            `"frozen"` keeps norms that divide by a constant, on which TransformerLens' own tools
            run and are exact, see `frozen_form`; `"sites"` gives back the model with norm sites
            that was exported: its gains, biases and constants one by one, to go on training or to
            thaw. Default: folded; a folder in TransformerLens' layout as it was written.
        tokenizer: Default: the checkpoint's own; a model in memory may go without.
        dtype: Of the weights.
        device: Default: the GPU if there is one, else the CPU.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub files are kept.
        sigma: For nanoGPT files, which do not state by what their norms divide: a number or a
            [d_model] tensor for every `blocks.{l}.ln1`, `blocks.{l}.ln2` and `ln_final`; `{}` if
            the norms are live. `lf.formats.nanogpt_sigma` makes it from the published tables.
        base: For an adapter: where the model is that it changes. Default: where it was when the
            adapter was written.
        bank: For a folder of `NormBanks.save`: the domain whose norms the model gets.
        check: Compare the logits with `transformers` on random tokens (one forward pass of each).

    Returns:
        A stock `HookedTransformer` in evaluation mode; with norm sites for form `"sites"`. Without
            a form, TransformerLens' layout and adapters come back as they were written.

    Raises:
        CheckpointError: if the checkpoint is missing, incomplete, broken or unreachable, or its
            norms are removed only in part.
        UnsupportedModelError: if the architecture cannot be represented faithfully.
        NormSiteError: if a finished form is asked of a model whose norms are live, or sigma does
            not fit the model.
        InexactError: if the logits differ from `transformers` by more than rounding explains.

    Examples:
        >>> import lnfree_interp as lf
        >>> model = lf.load(lf.bundled_checkpoint())
        >>> model.cfg.normalization_type, len(lf.list_norm_sites(model))
        ('LN', 13)
    """
    return load_checkpoint(
        source,
        form=form,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        revision=revision,
        cache_dir=cache_dir,
        sigma=sigma,
        base=base,
        bank=bank,
        check=check,
    ).model


@dataclass(frozen=True)
class Loaded:
    """A loaded model, its format and its measured error."""

    model: HookedTransformer
    format: str
    """What the checkpoint was recognised as, in words."""
    error: MeasuredError | None
    """The largest logit difference from transformers; None if it was not compared."""


def load_checkpoint(
    source: str | os.PathLike[str] | PreTrainedModel,
    *,
    form: Form | Literal["sites"] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    sigma: Sigma | None = None,
    base: str | os.PathLike[str] | None = None,
    bank: str | None = None,
    check: bool = True,
) -> Loaded:
    """What `load` returns, what the checkpoint was recognised as, and the measured error."""
    if form not in (None, *_FORMS):
        raise NormSiteError(
            f"form={form!r} does not exist: pass {', '.join(map(repr, _FORMS))} or None"
        )
    if dtype not in TOLERANCE:
        raise UnsupportedModelError(
            f"dtype={dtype} is not supported: pass one of {', '.join(map(str, TOLERANCE))}"
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "mps":
        raise UnsupportedModelError(
            "device='mps' has no float64, in which norms are folded: pass device='cpu'"
        )
    if isinstance(source, PreTrainedModel):
        name = source.config.name_or_path or "custom"
        if sigma is not None:
            raise NormSiteError(
                "sigma is for nanoGPT files, and this is a model in memory: leave sigma out"
            )
        if any(W.is_meta for W in source.parameters()):
            raise CheckpointError(f"{name}: a model on the meta device has no weights")
        _require_no_bank(bank, name)
        opened = OpenCheckpoint(source, tokenizer, "in memory", origin=origin_of(source))
    else:
        name = os.fspath(source)
        adapters, below, of, path = adapter.unwound(
            name,
            revision,
            lambda one, of: locate(one, of, cache_dir),
            None if base is None else os.fspath(base),
        )
        if adapters:
            adapters = [adapters[0].of_bank(bank), *(one.of_bank(None) for one in adapters[1:])]
            if sigma is not None:
                raise NormSiteError(f"{name}: sigma is for nanoGPT files: leave it out")
            whole = load_checkpoint(
                below,
                form=adapters[-1].content["base_form"],
                tokenizer=tokenizer,
                dtype=dtype,
                device=device,
                revision=of,
                cache_dir=cache_dir,
                check=check,
            )
            model, error = whole.model, None
            for one in reversed(adapters):
                model, error = one.put_back(model, check)
            if error is not None:
                record_agreement(model, error)
            what = "an adapter" if bank is None else f"bank {bank}"
            recognised = f"{what} of {adapters[0].base} ({whole.format})"
            return Loaded(_in_form(model, form), recognised, error)
        if base is not None:
            raise CheckpointError(f"{name}: base is for adapters, and this is a whole model")
        _require_no_bank(bank, name)
        if native.is_native(path):
            if sigma is not None:
                raise NormSiteError(
                    f"{name}: sigma is for nanoGPT files, and this folder holds its own "
                    "constants: leave sigma out"
                )
            model, error = native.read(path, tokenizer, dtype, device, check=check)
            _require_same_vocabulary(model.tokenizer, model.cfg, name)
            sidecar = read_sidecar(path)
            record_origin(model, None if sidecar is None else sidecar.weights)
            model = _in_form(model, form)
            if error is not None:
                changed = measured_agreement(model) or error
                record_agreement(model, max(error, changed, key=lambda one: one.absolute))
            return Loaded(model, "TransformerLens' own layout", error)
        opened = open_checkpoint(
            path, name, dtype=dtype, device=device, sigma=sigma, tokenizer=tokenizer
        )
    architecture_name, architecture = architecture_of(opened.hf_model.config, opened.hf_model)
    cfg = hooked_config(opened.hf_model.config, architecture_name, dtype, device, name)
    _require_same_vocabulary(opened.tokenizer, cfg, name)
    if cfg.eps >= LNFREE_EPSILON:
        published.refuse_float16(dtype, name)

    tokens = random_tokens(opened.hf_model, pos=_compared_length(cfg))
    expected = _reference(opened.hf_model, tokens, name) if check else None
    # The weights are moved one by one, so that memory never holds two models.
    weights = to_hooked_weights(architecture.layout, cfg, opened.take_weights(), name)
    norms, recognised = None, opened.format
    if not architecture.fixed_epsilon:
        norms = published.constant_epsilon_norms(
            weights, cfg.eps, architecture.centres, name, opened.sigma
        )
    if norms is None:
        if form is not None:
            raise NormSiteError(
                f"{name}: its norms are live, so it has no {form} form: remove_norms first, or "
                "load it with form=None"
            )
        model = hooked_transformer(cfg, _one_by_one(weights), opened.tokenizer)
    else:
        if not recognised.startswith("LN-free"):
            recognised = f"LN-free, norms with a constant epsilon of {cfg.eps:g} ({recognised})"
        model = _without_norms(cfg, weights, norms, opened, form or "folded")
    record_origin(model, opened.origin)
    if expected is None:
        return Loaded(model, recognised, None)
    error = measure_error(logits_of(model, tokens).cpu(), expected)
    error.require(
        f"{name}: HookedTransformer against transformers",
        logit_tolerance(error.dtype, architecture, constant_epsilon=norms is not None),
    )
    record_agreement(model, error)
    return Loaded(model, recognised, error)


def saved_live_sites(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> tuple[NormSite, ...] | None:
    """The live norm sites of a checkpoint that was written with its sites; None for any other.

    Args:
        source: Hub id, local folder or GGUF file.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: if they cannot be read.
    """
    adapters, below, of, path = _below(source, revision)
    if adapters:
        content = adapters[0].content
        if not content["sites"]:
            return None
        cfg = config_of(below, revision=of)
        every = native.saved_sites(path, cfg) if native.is_native(path) else sites_of(cfg)
        return tuple(site for site in every if str(site) not in content["frozen"])
    if not native.is_native(path):
        return None
    return native.saved_live_sites(path, config_of(source, revision=revision))


def config_of(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> HookedTransformerConfig:
    """The config of a checkpoint, without reading or downloading its weights.

    A published LN-free format may have the config of its original, with norms.

    Args:
        source: Hub id, local folder or GGUF file.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: if there is no config that can be read.
        UnsupportedModelError: if the architecture is not supported.
    """
    device = torch.device("cpu")
    _, name, revision, path = _below(source, revision)
    if path.is_file() and not is_gguf(path):
        raise CheckpointError(
            f"{name} is a nanoGPT file: make a folder of it first, with "
            f"lnfree convert {name} FOLDER --sigma FILE.json"
        )
    if native.is_native(path):
        return native.read_cfg(path, torch.float32, device)[0]
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{name}: no config.json, so this is not a Hugging Face checkpoint folder"
        )
    config = read_config(path, name)
    return hooked_config(config, architecture_of(config)[0], torch.float32, device, name)


def _below(
    source: str | os.PathLike[str], revision: str | None
) -> tuple[list[adapter.Adapter], str, str | None, Path]:
    """As `adapter.unwound`, without weights."""
    return adapter.unwound(
        os.fspath(source), revision, lambda one, of: locate(one, of, weights=False), None
    )


def _require_no_bank(bank: str | None, name: str) -> None:
    if bank is not None:
        raise CheckpointError(
            f"{name}: a whole model, which has no banks: give the folder that NormBanks.save "
            f"wrote, lf.load(FOLDER, bank={bank!r}, base={name!r}), in any form, folded too"
        )


def _compared_length(cfg: HookedTransformerConfig) -> int:
    """How many tokens to compare: more than a sliding window holds, unless it is very long."""
    window = cfg.window_size or 0 if cfg.use_local_attn else 0
    return max(CHECK_TOKENS, window + 16) if window <= 8 * CHECK_TOKENS else CHECK_TOKENS


def _reference(
    hf_model: PreTrainedModel, tokens: Int[Tensor, "batch pos"], name: str
) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits of transformers, on the CPU."""
    try:
        return logits_of(hf_model, tokens).cpu()
    except Exception as error:  # a model that can be built cannot always run
        raise CheckpointError(
            f"{name}: transformers itself cannot run it: {first_line(error)}"
        ) from error


def _require_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase | None, cfg: HookedTransformerConfig, name: str
) -> None:
    if tokenizer is None:
        cfg.tokenizer_name = None
    elif (largest := max(tokenizer.get_vocab().values(), default=0)) >= cfg.d_vocab:
        raise CheckpointError(
            f"{name}: the tokenizer has ids up to {largest}, the model only {cfg.d_vocab} tokens "
            "(vocab_size in config.json): they do not belong together"
        )


def _without_norms(
    cfg: HookedTransformerConfig,
    weights: dict[str, Tensor],
    norms: ConstantNorms,
    opened: OpenCheckpoint,
    form: Form | Literal["sites"],
) -> HookedTransformer:
    """An LN-free checkpoint in the form that the caller asked for."""
    cfg = replace(cfg, eps=opened.epsilon or LIVE_EPSILON)
    if form == "sites":
        return _with_frozen_sites(cfg, weights, norms, opened.tokenizer, opened.sigma or {})
    return finished_model(cfg, weights, norms, opened.tokenizer, form=form)


def _one_by_one(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in list(weights):
        yield name, weights.pop(name)


def _with_frozen_sites(
    cfg: HookedTransformerConfig,
    weights: dict[str, Tensor],
    norms: ConstantNorms,
    tokenizer: PreTrainedTokenizerBase | None,
    known: Mapping[str, float],
) -> HookedTransformer:
    """A model with frozen norm sites: its gains and biases, and the constants where known."""
    constants: dict[str, float] = {}
    for site, norm in norms.items():
        assert norm.scale is not None
        constants[site] = norm.scale
        weights[f"{whole_norm(site)}.w"] = (norm.multiplier * norm.scale).to(cfg.dtype)
        if norm.bias is not None:
            weights[f"{whole_norm(site)}.b"] = norm.bias
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        qk, v = f"{block}.ln1.qk", f"{block}.ln1.v"
        constants[qk] = known.get(qk, constants[v])
        if constants[qk] != constants[v]:
            ratio = constants[qk] / constants[v]
            rescale_queries_and_keys(weights, block, ratio, norms[v].bias)
    model = split_norms(hooked_transformer(cfg, _one_by_one(weights), tokenizer))
    for site, sigma in constants.items():
        freeze_site(model, site, sigma)
    return model


def _in_form(model: HookedTransformer, form: Form | Literal["sites"] | None) -> HookedTransformer:
    if form is None:
        return model
    if form == "sites":
        if has_norm_sites(model):
            return model
        raise NormSiteError(
            "form='sites' needs a folder that was exported from a model with norm sites; this one "
            "was exported without them"
        )
    if form == "frozen":
        return frozen_form(model)
    return model if model.cfg.normalization_type is None else fold(model)
