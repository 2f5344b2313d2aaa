"""Every identity of the analyses, checked on one model."""

from collections.abc import Iterator
from typing import Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.affine import affine_map
from lnfree_interp.analysis.attention import attribute_scores
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.contributions import Level
from lnfree_interp.analysis.counterfactual import counterfactual_pattern
from lnfree_interp.analysis.flow import flow_graph
from lnfree_interp.analysis.gaps import token_gap
from lnfree_interp.analysis.gates import hold
from lnfree_interp.analysis.lens import logit_lens
from lnfree_interp.analysis.logit_reading import read_logit
from lnfree_interp.analysis.logits import attribute_logits
from lnfree_interp.analysis.neurons import attribute_neuron, flip_distances
from lnfree_interp.analysis.paths import expand_paths
from lnfree_interp.analysis.questions import Prompt, read_one_prompt
from lnfree_interp.analysis.reads import read
from lnfree_interp.analysis.residual import decompose_residual
from lnfree_interp.analysis.weights import ov_table, virtual_weights
from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.direct_effects import direct_effect_additivity
from lnfree_interp.models.agreement import random_tokens
from lnfree_interp.models.running import run_and_keep
from lnfree_interp.numerics import measure_error


def certify(
    model: HookedTransformer,
    prompt: Prompt | None = None,
    *,
    frozen_scale: bool = False,
) -> tuple[Certificate, ...]:
    """Check every identity that the analyses rest on, on one prompt.

    Args:
        model: LN-free; or not, with `frozen_scale`: sums then still hold, what changes the stream
            (counterfactual patterns, the lens, tokens' shares, additivity of effects) does not.
        prompt: One, of at least two tokens. Default: 16 random ones.
        frozen_scale: As in `attribute_logits`.

    Returns:
        One certificate per identity; `certificate_table(...)` shows them.

    Raises:
        InexactError: if a norm is live and `frozen_scale` is False.
        DataError, UnsupportedModelError: as the analyses.

    Source:
        Ours: every exact claim of the package in one list, each against the model's own run.

    Examples:
        >>> certificates = lf.certify(free, "for i in range(")
        >>> all(certificate.holds for certificate in certificates)
        True
        >>> certificates[0].identity
        "sum over layers: parts = the model's logits"
    """
    prompt = random_tokens(model, 1, 16)[0] if prompt is None else prompt
    tokens = read_one_prompt(model, prompt)[0]
    if len(tokens) < 2:
        raise DataError("a prompt of one token has no next token: give at least two")
    return tuple(_certificates(model, tokens, frozen_scale))


def _certificates(
    model: HookedTransformer, tokens: Int[Tensor, " pos"], frozen_scale: bool
) -> Iterator[Certificate]:
    cfg = model.cfg
    last, answer, foil = cfg.n_layers - 1, int(tokens[-1]), int((tokens[-1] + 1) % cfg.d_vocab)
    has_mlp = not cfg.attn_only
    for by in get_args(Level):
        yield attribute_logits(
            model, tokens, answer, foil, by=by, frozen_scale=frozen_scale
        ).certificate
    yield attribute_logits(
        model, tokens, answer, by="head", biases=True, frozen_scale=frozen_scale
    ).certificate
    for by in get_args(Level):
        yield decompose_residual(model, tokens, f"blocks.{last}.hook_resid_pre", by=by).certificate
    scores = attribute_scores(model, tokens, last, 0, frozen_scale=frozen_scale)
    yield scores.certificate
    if len(scores.keys) > 1:
        yield scores.log_odds(scores.keys[-1], scores.keys[-2]).certificate
    without = ["embed"] if last == 0 else ["embed", "L0H0"]
    yield counterfactual_pattern(
        model, tokens, last, 0, without, frozen_scale=frozen_scale
    ).certificate
    if has_mlp:
        for of in ("pre", "post"):
            yield attribute_neuron(
                model, tokens, last, 0, of=of, frozen_scale=frozen_scale
            ).certificate
        if not frozen_scale:
            flips = flip_distances(model, tokens, last, "embed")
            yield flips.certificate
            if flips.affine is not None:
                yield flips.affine
    yield affine_map(
        model, tokens, answer, foil, frozen_scale=frozen_scale
    ).contributions.certificate
    yield _measured_certificate(model, tokens, answer, foil)
    yield expand_paths(model, tokens, answer, foil, frozen_scale=frozen_scale).certificate
    yield flow_graph(model, tokens, answer, foil, frozen_scale=frozen_scale).certificate
    yield logit_lens(model, tokens[None], frozen_scale=frozen_scale).certificate
    second = ["0_mlp_out"] if has_mlp else ["embed"]
    yield direct_effect_additivity(model, tokens[None], ["L0H0"], second).certificate
    if not frozen_scale:
        yield _table_certificate(model, tokens, answer)


def _measured_certificate(
    model: HookedTransformer, tokens: Int[Tensor, " pos"], answer: int, foil: int
) -> Certificate:
    """What tokens claim against runs without them, patterns and gates held and nothing else."""
    reading = read_logit(model, tokens, answer, foil, True)
    error = token_gap(model, hold(model, reading.tokens), reading)
    name = "a token's share = what the logit loses without it, patterns and gates held"
    return Certificate(name, error)


@torch.no_grad()
def _table_certificate(
    model: HookedTransformer, tokens: Int[Tensor, " pos"], answer: int
) -> Certificate:
    """Pattern times table, and the same for positions, is what a head of layer 0 adds."""
    found = attribute_logits(model, tokens, answer, by="source")
    rows = [c for c in found.components if c.kind == "head" and (c.layer, c.index) == (0, 0)]
    expected = torch.stack([found[component] for component in rows])
    # With weights and no activation but the pattern.
    hook = "blocks.0.attn.hook_pattern"
    pattern = run_and_keep(model, tokens[None], [hook])[1][hook][0, 0, -1]
    table = ov_table(model, 0, 0)
    moved = table.left[tokens] @ table.right[:, answer]
    if model.cfg.positional_embedding_type == "standard":
        weights: Any = virtual_weights(model, "pos_embed", "L0H0", "V")
        positions = weights.AB[: len(tokens)]
        moved = moved + positions @ table.right[:, answer]
    site_bias = _norm_bias(model)
    if site_bias is not None:
        moved = moved + site_bias @ table.right[:, answer]
    scale = found.values.abs().max().item()
    error = measure_error(pattern * moved, expected, scale)
    return Certificate("pattern x OV table = layer 0 head by source", error)


def _norm_bias(model: HookedTransformer) -> Tensor | None:
    """What the bias of the norm before layer 0 adds to the values of head 0."""
    bias = read(model, {}, "blocks.0.ln1.v").bias
    return None if bias is None else bias @ model.blocks[0].attn.W_V[0]
