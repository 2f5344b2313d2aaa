"""Do two models compute the same logits? The check behind every conversion."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lnfree_interp.numerics import MeasuredError, measure_error

LanguageModel = Callable[..., Any]
"""A `HookedTransformer` or a Hugging Face causal language model."""


def logits_of(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a `HookedTransformer` or a Hugging Face model, without gradient or dropout."""
    module = model if isinstance(model, nn.Module) else None
    was_training = module is not None and module.training
    if module is not None:
        module.eval()
    try:
        with torch.no_grad():
            output = model(tokens)
    finally:
        if module is not None:
            module.train(was_training)
    return getattr(output, "logits", output)


def _shape_of(model: Any) -> tuple[int, int, torch.device]:
    """Vocabulary, context length and device of either kind of model."""
    if hasattr(model, "cfg"):
        return model.cfg.d_vocab, model.cfg.n_ctx, model.W_E.device
    config = model.config
    return config.vocab_size, config.max_position_embeddings, model.device


def random_tokens(
    model: Any, batch: int = 2, pos: int = 128, seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """Uniformly random tokens that fit the model's vocabulary and context."""
    d_vocab, n_ctx, device = _shape_of(model)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(d_vocab, (batch, min(pos, n_ctx)), generator=generator).to(device)


def compare_logits(
    found: LanguageModel,
    expected: LanguageModel,
    tokens: Int[Tensor, "batch pos"] | None = None,
) -> MeasuredError:
    """The largest logit difference between two models on the same tokens.

    Args:
        found: A `HookedTransformer` or a Hugging Face causal language model.
        expected: Either kind; its largest logit is what the relative error divides by.
        tokens: [batch, pos]. Default: two rows of random tokens, which visit weights that text
            would rarely touch.

    Returns:
        The largest difference over all batch, position and vocabulary entries.
    """
    tokens = random_tokens(expected) if tokens is None else tokens
    return measure_error(logits_of(found, tokens), logits_of(expected, tokens))
