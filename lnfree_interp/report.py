"""`lnfree report`: what a run or a model is, as one page that needs no network."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import torch
from transformer_lens import HookedTransformer

from lnfree_interp import plots
from lnfree_interp.analysis.affine import affine_map
from lnfree_interp.analysis.attention import attribute_scores
from lnfree_interp.analysis.contributions import Contributions
from lnfree_interp.analysis.flow import flow_graph
from lnfree_interp.analysis.lens import logit_lens
from lnfree_interp.analysis.logit_reading import read_logit
from lnfree_interp.analysis.logits import attribute_logits
from lnfree_interp.analysis.questions import read_one_prompt
from lnfree_interp.analysis.reads import held
from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.data.named import evaluation_text
from lnfree_interp.demo import readable_prompts
from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.evaluation.certify import certify
from lnfree_interp.evaluation.evaluate import evaluate
from lnfree_interp.evaluation.job import require_same_tokenizer
from lnfree_interp.evaluation.results import Evaluation
from lnfree_interp.files import anywhere, require_new_file, write_new_file
from lnfree_interp.models.sites import live_sites
from lnfree_interp.plots.page import Section, page
from lnfree_interp.removal.named_models import NamedModel, find_model, load_named
from lnfree_interp.tables import Table

MODEL, ORIGINAL = "lnfree", "original"


@dataclass(frozen=True)
class Question:
    """A logit to explain."""

    prompt: str
    answer: str | int
    foil: str | int | None = None


def write_report(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    against: str | None = None,
    text: str = "stdlib",
    sequences: int = 64,
    questions: Sequence[Question] = (),
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Evaluate, certify, attribute and draw, and write one HTML page.

    Args:
        source: A run's folder, what `lnfree demo` wrote, or a model: hub id or local folder.
        out: The file; must not exist yet.
        against: The original. Default: what a run says it started from.
        text: To evaluate on, as for `evaluation_text`.
        sequences: Of text.
        questions: Logits to explain. Default: a few about Python source, as in the demo.
        progress: Whether to show progress bars.
        say: Gets a line before each stage.

    Raises:
        OutputError: if the file cannot be written.
        LnfreeError: whatever loading and the analyses raise.
    """
    target = require_new_file(out)
    subject, models = find_model(source), {}
    original = subject.original if against is None else find_model(against).checkpoint
    for name, where in ((ORIGINAL, original), (MODEL, subject.checkpoint)):
        if where is not None:
            say(f"loading {where}")
            run = os.fspath(source) if name == ORIGINAL and against is None else None
            models[name] = load_named(where, recorded_by=run)
    model = models.pop(MODEL)
    require_same_tokenizer({**models, MODEL: model})
    named = MODEL if not live_sites(model) else "vanilla" if subject.history else "model"
    models[named] = model
    asked = list(questions) or _default_questions(model)
    for question in asked:  # before the long part
        with suppress(UnsupportedModelError):
            read_logit(model, question.prompt, question.answer, question.foil, None)
    sequence_length = min(256, *(one.cfg.n_ctx for one in models.values()))
    tokens = evaluation_text(text, model.tokenizer, sequence_length, sequences)
    say(f"evaluating on {tokens.numel():,} tokens of {text}")
    if subject.text not in (None, text, anywhere(text)):
        say(f"    it was trained on {subject.text}: --data evaluates on that")
    first = ORIGINAL if ORIGINAL in models else None
    evaluation = evaluate(models, tokens, original=first, text=text, progress=progress)
    sections = [*_training(subject, named), *_quality(evaluation)]
    for question in asked:
        say(f"explaining what follows {question.prompt!r:.60}")
        try:
            sections.append(_explained(model, question))
        except UnsupportedModelError as error:
            sections.append(Section(f"After “{question.prompt[-60:]}”", f"Not explained: {error}."))
    if not held(model, True):
        say("checking every identity")
        sections.append(_certified(model))
    norms = "no norms" if not live_sites(model) else f"{len(live_sites(model))} live norms"
    cfg = model.cfg
    content = page(
        f"Report: {os.fspath(source)}",
        (f"Compared with {_shown(original)}. " if original else "")
        + f"A model of {cfg.n_layers} layers x {cfg.d_model}, {cfg.n_heads} heads, {norms}. "
        "Sums on this page were checked against the numbers that the model itself computed"
        + (", with what is not linear held." if held(model, True) else "."),
        sections,
        footer=f"lnfree_interp; torch {torch.__version__}; {text}, {tokens.numel():,} tokens",
    )
    return write_new_file(target, content)


def _shown(original: str) -> str:
    return "the bundled checkpoint" if original == str(bundled_checkpoint()) else original


def _default_questions(model: HookedTransformer) -> list[Question]:
    if model.tokenizer is None:
        return []
    return [Question(*found) for found in readable_prompts(model)[-2:]]


def _training(subject: NamedModel, name: str) -> list[Section]:
    if not subject.history:
        return []
    figures: list[go.Figure] = [plots.training_curve({name: subject.history})]
    if any(record.probes.get("drift") for record in subject.history):
        figures.append(plots.sigma_drift(subject.history))
    frozen = sum(len(record.frozen) for record in subject.history)
    text = f"{len(subject.history)} steps, in which {frozen} norm sites were frozen."
    return [Section("Removing the norms" if frozen else "Training", text, figures)]


def _quality(evaluation: Evaluation) -> list[Section]:
    effects = {
        name: model.direct_effects
        for name, model in evaluation.models.items()
        if model.direct_effects is not None
    }
    curves = [plots.loss_by_position(evaluation), plots.residual_norms(evaluation)]
    return [
        Section(
            "Is it still the same model?",
            "Cross-entropies, entropies and divergences in nats per token. The mean alone can "
            "hide, or be made by, a few tokens.",
            [evaluation.table(), *curves],
        ),
        Section(
            "Does attribution tell the truth?",
            "What each head adds to the true next token's logit, against what that logit loses "
            "when the head's output is taken out of the final residual stream.",
            [plots.direct_effects(effects)] if effects else [],
        ),
    ]


def _explained(model: HookedTransformer, question: Question) -> Section:
    """One logit by block, head, source token and input token, and how it flows."""
    hold = bool(held(model, True))
    ask = (model, question.prompt, question.answer, question.foil)
    by_source = attribute_logits(*ask, by="source", frozen_scale=hold).verify()
    figures = [
        plots.attribution(attribute_logits(*ask, by="block", frozen_scale=hold).verify()),
        plots.attribution(attribute_logits(*ask, by="head", frozen_scale=hold).verify()),
        plots.attribution(by_source),
        plots.attribution(affine_map(*ask, frozen_scale=hold).verify()),
        plots.flow(flow_graph(*ask, top_k=30, frozen_scale=hold).verify()),
    ]
    tokens = read_one_prompt(model, question.prompt)
    layer, head = _largest_head(by_source)
    if layer > 0 and not model.cfg.use_qk_norm:
        scores = attribute_scores(model, question.prompt, layer, head, frozen_scale=hold)
        figures.append(plots.scores(scores.verify()))
    if tokens.shape[1] > 1:
        figures.append(plots.lens(logit_lens(model, tokens, frozen_scale=hold)))
    return Section(f"Why {by_source.of[0]} after “{question.prompt[-60:]}”?", "", figures)


def _largest_head(by_source: Contributions) -> tuple[int, int]:
    """The head that adds most from a single token."""
    sizes = [
        abs(value.item()) if component.kind == "head" else 0.0 for component, value in by_source
    ]
    best = by_source.components[sizes.index(max(sizes))]
    if best.layer is None or best.index is None:
        raise DataError("the model has no heads")
    return best.layer, best.index


def _certified(model: HookedTransformer) -> Section:
    rows = [
        [
            certificate.identity,
            f"{certificate.error.relative:.1e}",
            f"{certificate.error.tolerance:.0e}",
            "yes" if certificate.holds else "NO",
        ]
        for certificate in certify(model)
    ]
    return Section(
        "How exact is all this?",
        "Every identity behind the analyses, on random tokens: the largest error relative to the "
        "largest part.",
        [Table(["identity", "error", "tolerance", "holds"], rows)],
    )
