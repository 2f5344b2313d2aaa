"""`lnfree report`: what a run or a model is, as one page that needs no network."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import torch
from transformer_lens import HookedTransformer

from lnfree_interp import plots
from lnfree_interp.analysis.affine import affine_map
from lnfree_interp.analysis.attention import attribute_scores
from lnfree_interp.analysis.certificates import certificate_table
from lnfree_interp.analysis.contributions import Contributions
from lnfree_interp.analysis.flow import flow_graph
from lnfree_interp.analysis.lens import logit_lens
from lnfree_interp.analysis.logits import attribute_logits
from lnfree_interp.analysis.questions import read_one_prompt
from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.checkpoints.loading import load
from lnfree_interp.data.named import evaluation_text
from lnfree_interp.demo import readable_prompts
from lnfree_interp.errors import CheckpointError, DataError
from lnfree_interp.evaluation.certify import certify
from lnfree_interp.evaluation.evaluate import Evaluation, evaluate
from lnfree_interp.files import require_new_file
from lnfree_interp.models.sites import live_sites
from lnfree_interp.plots.page import Section, page
from lnfree_interp.removal.run import StepRecord
from lnfree_interp.removal.rundir import RunFolder
from lnfree_interp.tables import Table

MODEL, ORIGINAL = "lnfree", "original"


@dataclass(frozen=True)
class Question:
    """A logit to explain."""

    prompt: str
    answer: str | int
    foil: str | int | None = None


@dataclass(frozen=True)
class _Subject:
    """What a source turned out to be."""

    model: str
    original: str | None
    history: tuple[StepRecord, ...] = ()
    recipe: str = ""


def write_report(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    against: str | None = None,
    text: str = "stdlib",
    blocks: int = 64,
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
        blocks: Of text.
        questions: Logits to explain. Default: a few about Python source, as in the demo.
        progress: Whether to show progress bars.
        say: Gets a line before each stage.

    Raises:
        OutputError: if the file cannot be written.
        LnfreeError: whatever loading and the analyses raise.
    """
    target = require_new_file(out)
    subject = _subject(os.fspath(source), against)
    models = {}
    for name, where in ((ORIGINAL, subject.original), (MODEL, subject.model)):
        if where is not None:
            say(f"loading {where}")
            models[name] = load(where)
    model = models[MODEL]
    shown = model if subject.original is not None or not live_sites(model) else None
    names = {MODEL: MODEL if shown is not None else "model"}
    models = {names.get(name, name): one for name, one in models.items()}
    block = min(256, *(one.cfg.n_ctx for one in models.values()))
    tokens = evaluation_text(text, model.tokenizer, block, blocks)
    say(f"evaluating on {tokens.numel():,} tokens of {text}")
    original = ORIGINAL if ORIGINAL in models else None
    evaluation = evaluate(models, tokens, original=original, text=text, progress=progress)
    asked = list(questions) or [Question(*found) for found in readable_prompts(model)[-2:]]
    sections = [*_training(subject), *_quality(evaluation)]
    for question in asked:
        say(f"explaining what follows {question.prompt!r:.60}")
        sections.append(_explained(model, question))
    if not live_sites(model):
        say("checking every identity")
        sections.append(_certified(model))
    norms = "no norms" if not live_sites(model) else f"{len(live_sites(model))} live norms"
    cfg = model.cfg
    content = page(
        f"Report: {Path(os.fspath(source)).name or source}",
        f"A model of {cfg.n_layers} layers x {cfg.d_model}, {cfg.n_heads} heads, {norms}. Every "
        "sum on this page was checked against the number that the model itself computed.",
        sections,
        footer=f"lnfree_interp; torch {torch.__version__}; {text}, {tokens.numel():,} tokens",
    )
    target.write_text(content, encoding="utf-8")
    return target


def _subject(source: str, against: str | None) -> _Subject:
    folder = Path(source)
    if (folder / "run.json").is_file():
        run, config = RunFolder.open(folder)
        if not (folder / "model").is_dir():
            raise CheckpointError(f"{source} is not finished: it has no model yet")
        about = config.get("about") or {}
        original = against or about.get("model") or str(bundled_checkpoint())
        name = str(config.get("recipe", {}).get("name", ""))
        return _Subject(str(folder / "model"), original, run.records(), name)
    if (folder / "metrics.json").is_file() and (folder / "model").is_dir():
        return _Subject(str(folder / "model"), against or str(bundled_checkpoint()))
    return _Subject(source, against)


def _training(subject: _Subject) -> list[Section]:
    if not subject.history:
        return []
    figures: list[go.Figure] = [plots.training_curve({MODEL: subject.history})]
    if any(record.probes.get("drift") for record in subject.history):
        figures.append(plots.sigma_drift(subject.history))
    frozen = sum(len(record.frozen) for record in subject.history)
    text = f"{len(subject.history)} steps, in which {frozen} norm sites were frozen."
    return [Section("Removing the norms", text, figures)]


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
    held = {"frozen_scale": bool(live_sites(model))}
    ask = (model, question.prompt, question.answer, question.foil)
    by_source = attribute_logits(*ask, by="source", **held).verify()
    figures = [
        plots.attribution(attribute_logits(*ask, by="block", **held).verify()),
        plots.attribution(attribute_logits(*ask, by="head", **held).verify()),
        plots.attribution(by_source),
        plots.attribution(affine_map(*ask, **held)),
        plots.flow(flow_graph(*ask, top_k=30, **held).verify()),
    ]
    tokens = read_one_prompt(model, question.prompt)
    layer, head = _largest_head(by_source)
    if layer > 0:
        scores = attribute_scores(model, question.prompt, layer, head, **held)
        figures.append(plots.scores(scores.verify()))
    if tokens.shape[1] > 1:
        figures.append(plots.lens(logit_lens(model, tokens, **held)))
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
    table = certificate_table(certify(model))
    rows = [
        [row.identity, f"{row.relative:.1e}", f"{row.tolerance:.0e}", "yes" if row.holds else "NO"]
        for row in table.itertuples()
    ]
    return Section(
        "How exact is all this?",
        "Every identity behind the analyses, on random tokens: the largest error relative to the "
        "largest part.",
        [Table(["identity", "error", "tolerance", "holds"], rows)],
    )
