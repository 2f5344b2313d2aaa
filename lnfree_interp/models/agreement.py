"""Do two models compute the same logits? The check behind every conversion."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from lnfree_interp.models.running import run
from lnfree_interp.numerics import MeasuredError, measure_error

LanguageModel = HookedTransformer | PreTrainedModel
"""Either kind of causal language model."""


def logits_of(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a `HookedTransformer` or a Hugging Face model, without gradient or dropout."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            tokens = tokens.to(next(model.parameters()).device)
            if not isinstance(model, PreTrainedModel):
                return run(model, tokens)
            returned, model.config.return_dict = model.config.return_dict, True
            try:
                return model(tokens, use_cache=False).logits
            finally:
                model.config.return_dict = returned
    finally:
        for module, mode in modes.items():
            module.training = mode


def random_tokens(
    model: LanguageModel, batch: int = 2, pos: int = 128, seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """Uniformly random tokens that fit the model's vocabulary and context."""
    if isinstance(model, HookedTransformer):
        d_vocab, n_ctx = model.cfg.d_vocab, model.cfg.n_ctx
    else:
        d_vocab, n_ctx = model.config.vocab_size, model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(d_vocab, (batch, min(pos, n_ctx)), generator=generator)


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
        A `MeasuredError`, the largest difference over all batch, position and vocabulary entries,
            in logits.

    Examples:
        >>> again = lf.load(lf.bundled_checkpoint())
        >>> lf.compare_logits(again, model, tokens).absolute
        0.0
    """
    tokens = random_tokens(expected) if tokens is None else tokens
    return measure_error(logits_of(found, tokens), logits_of(expected, tokens))
