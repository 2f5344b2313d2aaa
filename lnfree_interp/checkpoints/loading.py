"""Hugging Face checkpoint -> `HookedTransformer`, with the same logits or not at all."""

import math
import os

import torch
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lnfree_interp.checkpoints.architectures import hooked_config, hooked_weights
from lnfree_interp.checkpoints.source import open_in_transformers
from lnfree_interp.errors import CheckpointError, UnsupportedModelError
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.construct import hooked_transformer
from lnfree_interp.models.folding import fold
from lnfree_interp.models.sites import freeze_site, list_norm_sites, with_norm_sites

LNFREE_EPSILON = 1e8
"""From this epsilon on a LayerNorm divides by sqrt(epsilon), whatever its input: the published
trick (epsilon 1e12, gains multiplied by 1e6) for an LN-free `GPT2LMHeadModel`."""


def load(
    source: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    check: bool = True,
) -> HookedTransformer:
    """A checkpoint as a stock `HookedTransformer`: weights unprocessed, norms as they are.

    An LN-free export (all norms at an epsilon of 1e12) comes back folded, with
    `normalization_type=None`.

    Args:
        source: Hub id, local folder, or a `transformers` model that is already in memory.
        tokenizer: Default: the checkpoint's own; a model in memory may go without.
        dtype: Of the weights.
        device: Default: the GPU if there is one, else the CPU.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub files are kept.
        check: Compare the logits with `transformers` on random tokens (one forward pass of each).

    Raises:
        CheckpointError: if the checkpoint is missing, incomplete, broken or unreachable.
        UnsupportedModelError: if the architecture cannot be represented faithfully.
        InexactError: if the logits differ from `transformers` by more than rounding explains.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(source, PreTrainedModel):
        hf_model, name = source, source.config.name_or_path or "custom"
    else:
        name = os.fspath(source)
        hf_model, own_tokenizer = open_in_transformers(
            name, dtype=dtype, device=device, revision=revision, cache_dir=cache_dir
        )
        tokenizer = tokenizer or own_tokenizer
    cfg = hooked_config(hf_model, dtype, device, name)
    if tokenizer is None:
        cfg.tokenizer_name = None
    elif len(tokenizer) > cfg.d_vocab:
        raise CheckpointError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {cfg.d_vocab}: "
            "they do not belong together"
        )
    if cfg.eps >= LNFREE_EPSILON and dtype == torch.float16:
        raise UnsupportedModelError(f"{name}: its gains of 1e6 overflow float16: load in float32")
    model = hooked_transformer(cfg, hooked_weights(hf_model, cfg), tokenizer)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
        raise CheckpointError(f"{name}: weights that are not finite: {', '.join(broken[:3])}")
    if cfg.eps >= LNFREE_EPSILON:
        model = _fold_constant_norms(model)
    if check:
        compare_logits(model, hf_model).require(f"{name}: HookedTransformer against transformers")
    return model


def _fold_constant_norms(model: HookedTransformer) -> HookedTransformer:
    """Norms that divide by sqrt(epsilon), made explicit and folded away."""
    model = with_norm_sites(model)
    for site in list_norm_sites(model):
        freeze_site(model, site, math.sqrt(model.cfg.eps))
    return fold(model)
