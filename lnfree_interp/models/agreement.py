"""Do two models compute the same logits? The check behind every conversion, and its record."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from lnfree_interp.errors import InexactError
from lnfree_interp.models.running import Edit, run, run_and_keep
from lnfree_interp.numerics import MeasuredError, measure_error

LanguageModel = HookedTransformer | PreTrainedModel
"""Either kind of causal language model."""

_RECORD = "_lnfree_measured_agreement"
"""Attribute of a made model: absolute, relative, dtype. Plain values, so that a stock model stays
one that needs no class of this package."""

_ORIGIN = "_lnfree_weights_origin"
"""Attribute of a model whose weights lost precision before they came here: how, in words."""


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
    """Uniformly random tokens that fit the model's vocabulary and context; behind the
    beginning-of-text token if the model's own `to_tokens` puts it there: some models know no other
    beginning."""
    if isinstance(model, HookedTransformer):
        d_vocab, n_ctx = model.cfg.d_vocab, model.cfg.n_ctx
    else:
        d_vocab, n_ctx = model.config.vocab_size, model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(d_vocab, (batch, min(pos, n_ctx)), generator=generator)
    if isinstance(model, HookedTransformer) and model.cfg.default_prepend_bos:
        bos = getattr(model.tokenizer, "bos_token_id", None)
        if bos is not None and bos < d_vocab:
            tokens[:, 0] = bos
    return tokens


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


def require_same_logits(
    made: LanguageModel, given: LanguageModel, what: str, tolerance: float | None = None
) -> MeasuredError:
    """Compare a model with the one that it was made from, and keep the error with it.

    Args:
        made: The new model.
        given: What it was made from; not changed.
        what: What was compared, for messages.
        tolerance: Largest relative error allowed. Default: by dtype.

    Raises:
        InexactError: if the given model's logits are not finite, or the made one's differ from
            them by more than the tolerance.
    """
    tokens = random_tokens(given)
    expected = logits_of(given, tokens)
    if not expected.isfinite().all():
        raise InexactError(f"{what}: {_not_finite(given, tokens)}")
    error = measure_error(logits_of(made, tokens), expected).require(what, tolerance)
    record_agreement(made, error)
    record_origin(made, origin_of(given))
    return error


def _not_finite(model: LanguageModel, tokens: Int[Tensor, "batch pos"]) -> str:
    """Why there is nothing to compare with, for a message: where the first NaN arises."""
    said = "the logits of the given model are not finite numbers, so nothing can be compared"
    if isinstance(model, HookedTransformer):
        found: list[str] = []

        def look(name: str) -> Edit:
            def at(activation: Tensor) -> None:
                # Masked scores are -inf, as they should be.
                if activation.isnan().any() or activation.isposinf().any():
                    found.append(name)

            return at

        with torch.no_grad():
            run_and_keep(model, tokens, (), edits={name: look(name) for name in model.hook_dict})
        said += f". The first activation that is not finite is {found[0]}" if found else ""
    broken = [name for name, W in model.named_parameters() if not W.isfinite().all()]
    if broken:
        return f"{said}. The weight {broken[0]} is not finite: load or make the model again"
    return f"{said}. No weight is broken: the activations overflow, so use float32 or float64"


def record_agreement(model: LanguageModel, error: MeasuredError) -> None:
    """Keep with a model how far its logits were from those of what it was made from."""
    setattr(model, _RECORD, (error.absolute, error.relative, error.dtype))


def record_origin(model: LanguageModel, origin: str | None) -> None:
    """Keep with a model, and with what is made from it, how its weights lost precision."""
    if origin is not None:
        setattr(model, _ORIGIN, origin)


def origin_of(model: LanguageModel) -> str | None:
    """How a model's weights lost precision before they came here, in words; None if unknown."""
    return getattr(model, _ORIGIN, None)


def measured_agreement(model: HookedTransformer) -> MeasuredError | None:
    """How far a model's logits were from those of what it was made from.

    Measured on random tokens when the model was made, and kept with it and its copies; a change
    of the weights afterwards does not change it.

    Args:
        model: From `fold`, `frozen_form`, `with_norm_sites`, `to_rms(...).model`,
            `to_crms(...).model` or `load`, which compares with `transformers`, or with the logits
            in a folder of TransformerLens' layout.

    Returns:
        The largest logit difference; None for a model that was not compared with another, such as
            one from `load(..., check=False)`.

    Examples:
        >>> lf.measured_agreement(lf.frozen_form(free)).relative < 1e-5
        True
        >>> lf.measured_agreement(lf.load(lf.bundled_checkpoint(), check=False)) is None
        True
    """
    record = getattr(model, _RECORD, None)
    return None if record is None else MeasuredError(*record)
