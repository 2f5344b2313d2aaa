"""A check of every identity of the analyses, on one model."""

from collections.abc import Iterator
from typing import Any

import torch
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.affine import affine_map, as_target, carry_back
from lnfree_interp.analysis.attribute import attribute, attribute_logits, attribute_neuron
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.counterfactual import counterfactual_pattern
from lnfree_interp.analysis.flow import flow_graph
from lnfree_interp.analysis.gaps import token_gap
from lnfree_interp.analysis.interventions import ablate
from lnfree_interp.analysis.lens import logit_lens
from lnfree_interp.analysis.levels import LEVELS
from lnfree_interp.analysis.logit_targets import LogitDifference
from lnfree_interp.analysis.neurons import flip_distances
from lnfree_interp.analysis.paths import expand_paths
from lnfree_interp.analysis.prompts import Prompt
from lnfree_interp.analysis.residual import decompose_residual
from lnfree_interp.analysis.score_targets import LogOdds, Score
from lnfree_interp.analysis.scores import attribute_scores
from lnfree_interp.analysis.targets import Probe
from lnfree_interp.analysis.trace import Trace, trace
from lnfree_interp.analysis.view import Model, view_of
from lnfree_interp.analysis.weights import ov_table, virtual_weights
from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.direct_effects import direct_effect_additivity
from lnfree_interp.numerics import measure_error


@torch.no_grad()
def certify(
    model: Model | Trace, prompt: Prompt | None = None, *, hold: bool = False
) -> tuple[Certificate, ...]:
    """Check every identity that the analyses rest on, on one prompt.

    Args:
        model: An LN-free model; any model with `hold`, whose certificates then say what was held
            and what that misses; or a trace of one prompt.
        prompt: One prompt of at least two tokens. Default: 16 random tokens.
        hold: Whether live norms' scales and soft caps' slopes are held.

    Returns:
        One certificate per identity; `certificate_table(...)` shows them.

    Raises:
        InexactError: if a norm is live and `hold` is False.
        DataError: for a prompt of one token, or several prompts.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Ours: every exact claim of the package in one list, each checked against the model's run.

    Examples:
        >>> certificates = lf.certify(free, "for i in range(")
        >>> all(certificate.holds for certificate in certificates)
        True
        >>> certificates[0].identity
        "sum over layers: parts = the model's logits"
    """
    if isinstance(model, Trace):
        one = model
    else:
        cfg = view_of(model).cfg
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(cfg.d_vocab, (min(16, cfg.n_ctx),), generator=generator)
        one = trace(model, drawn if prompt is None else prompt, hold=hold)
    if one.batch > 1 or one.n_pos < 2:
        raise DataError(f"give one prompt of at least two tokens, not {one.lengths}")
    return tuple(_certificates(one))


def _certificates(one: Trace) -> Iterator[Certificate]:
    view, tokens = one.view, one.tokens[0]
    last, answer = view.n_layers - 1, int(tokens[-1])
    foil = (answer + 1) % view.cfg.d_vocab_out
    difference = LogitDifference(answer, foil)
    before = f"blocks.{last}.hook_resid_pre"
    for by in LEVELS:
        yield attribute(one, difference, by).certificate
    yield attribute_logits(one, answer, by="head", biases=True).certificate
    for by in LEVELS:
        yield decompose_residual(one, before, by=by).certificate
    whole = Probe(view.W_E[answer], before, slice(None), bias=1.0, mean=True)
    yield attribute(one, whole, "neuron").certificate
    if view.explains_scores and view.weighing(last) == "softmax":
        yield from _score_certificates(one, last)
    if view.has_mlps:
        for of in ("pre", "post"):
            yield attribute_neuron(one, last, 0, of=of).certificate
        if not one.hold:
            flips = flip_distances(one, last, "embed")
            yield flips.certificate
            if flips.affine is not None:
                yield flips.affine
    yield affine_map(one, answer, foil).certificate
    way = carry_back(one, as_target(answer, foil))
    name = "a token's share = what the logit loses without it, patterns and gates given"
    yield Certificate(name, token_gap(one, way.reading, way.u), way.held)
    yield expand_paths(one, answer, foil).certificate
    yield flow_graph(one, answer, foil).certificate
    yield logit_lens(one).certificate
    second = "0_mlp_out" if view.has_mlps else "embed"
    yield ablate(one, ["L0H0", second]).compare(difference).certificate
    if view.weighing(last) == "count":
        hidden = ablate(one, [f"L{last}H0@0", f"L{last}H0@{one.n_pos - 1}"], "unseen")
        yield hidden.compare(difference).certificate
    yield direct_effect_additivity(view.model, one.tokens, ["L0H0"], [second]).certificate
    if not one.hold:
        yield _table_certificate(one, answer)


def _score_certificates(one: Trace, layer: int) -> Iterator[Certificate]:
    scores = attribute_scores(one, layer, 0)
    yield scores.certificate
    key, other = scores.keys[-1], scores.keys[-2 % len(scores.keys)]
    for side in ("query", "key"):
        yield attribute(one, Score(layer, 0, key=key, side=side)).certificate
        if key != other:
            target = LogOdds(layer, 0, key=key, other=other, side=side)
            yield attribute(one, target).certificate
    without = ["embed"] if layer == 0 else ["embed", "L0H0"]
    yield counterfactual_pattern(one, layer, 0, without).certificate


def _table_certificate(one: Trace, answer: int) -> Certificate:
    """The pattern times the OV table, with positions added, is what a head of layer 0 adds."""
    view, tokens = one.view, one.tokens[0]
    found = attribute_logits(one, answer, by="source")
    found = found if one.single else found.select(prompt=0)
    rows = [c for c in found.components if c.kind == "head" and (c.layer, c.index) == (0, 0)]
    expected = torch.stack([found[component] for component in rows])
    # This uses the weights, and of the activations only the pattern.
    pattern = one[get_act_name("pattern", 0)][0, 0, -1]
    table = ov_table(view.model, 0, 0)
    moved = table.left[tokens] @ table.right[:, answer]
    if view.has_positions:
        weights: Any = virtual_weights(view.model, "pos_embed", "L0H0", "V")
        moved = moved + weights.AB[: len(tokens)] @ table.right[:, answer]
    # A table is not about a first token with constants of its own.
    start = int(any(view.scale_hook(site) is not None for site in ("blocks.0.ln1.v", "ln_final")))
    largest = found.values.abs().max().item()
    error = measure_error((pattern * moved)[start:], expected[start:], largest)
    return Certificate("pattern x OV table = layer 0 head by source", error)
