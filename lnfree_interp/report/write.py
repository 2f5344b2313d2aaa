"""`lnfree report`: what is known about a run or a model, on one page that needs no network."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.attribute import attribute_logits
from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.data.named import NAMED, evaluation_text
from lnfree_interp.data.names import text_for
from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.evaluation.certify import certify
from lnfree_interp.evaluation.evaluate import evaluate
from lnfree_interp.evaluation.run_job import require_same_tokenizer
from lnfree_interp.files import anywhere, require_new_file, write_new_file
from lnfree_interp.models.sites import live_sites
from lnfree_interp.plots.page import Section, page
from lnfree_interp.removal.named_models import find_model, load_named
from lnfree_interp.report import sections as build
from lnfree_interp.report.job import ReportJob
from lnfree_interp.report.sections import Question

MODEL, ORIGINAL = "lnfree", "original"


def write_report(
    job: ReportJob,
    out: str | os.PathLike[str],
    *,
    questions: Sequence[Question] = (),
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Evaluate a model, check its identities, explain some logits, and write one HTML page.

    Args:
        job: The model and the text.
        out: The file; it must not exist yet.
        questions: Logits to explain. Default: the job's, or two about Python source.
        progress: Whether to show progress bars.
        say: Is given a line before each stage.

    Returns:
        The file.

    Raises:
        OutputError: if the file cannot be written.
        DataError: if no text is named for a model other than the bundled one.
        LnfreeError: for what loading and the analyses refuse.
    """
    target = require_new_file(out)
    found, models = find_model(job.source), {}
    text = text_for(job.data, job.source, bundled=found.bundled, also=NAMED)
    original = found.original if job.original is None else find_model(job.original).checkpoint
    for name, where in ((ORIGINAL, original), (MODEL, found.checkpoint)):
        if where is not None:
            say(f"loading {where}")
            run = job.source if name == ORIGINAL and job.original is None else None
            models[name] = load_named(where, recorded_by=run)
    model = models.pop(MODEL)
    require_same_tokenizer({**models, MODEL: model})
    named = MODEL if not live_sites(model) else "vanilla" if found.history else "model"
    models[named] = model
    asked = list(questions) or _questions(job, model)
    traces = {}
    for question in asked:  # so that a wrong one is refused before the evaluation
        with suppress(UnsupportedModelError):
            traces[question] = build.traced(model, question)
            attribute_logits(traces[question], question.answer, question.foil)
    length = min(256, *(one.cfg.n_ctx for one in models.values()))
    tokens = evaluation_text(text, model.tokenizer, length, job.sequences)
    say(f"evaluating on {tokens.numel():,} tokens of {text}")
    if found.text not in (None, text, anywhere(text)):
        say(f"    the run was trained on {found.text}; --data evaluates on that")
    first = ORIGINAL if ORIGINAL in models else None
    evaluation = evaluate(models, tokens, original=first, text=text, progress=progress)
    sections = [*build.training({named: found.history}), *build.quality(evaluation)]
    for question in asked:
        say(f"explaining what follows {question.prompt!r:.60}")
        try:
            one = traces.get(question) or build.traced(model, question)
            sections.append(build.explanation(one, question))
        except UnsupportedModelError as error:
            sections.append(Section(f"After “{question.prompt[-60:]}”", f"Not explained: {error}."))
    if not build.holds(model):
        say("checking every identity")
        about = (
            "Every identity behind the analyses, on random tokens: the largest error, relative to "
            "the largest part."
        )
        sections.append(build.exactness(about, build.certificates_table(certify(model))))
    norms = "no norms" if not live_sites(model) else f"{len(live_sites(model))} live norms"
    cfg = model.cfg
    content = page(
        f"Report: {job.source}",
        (f"Compared with {_shown(original)}. " if original else "")
        + f"A model of {cfg.n_layers} layers x {cfg.d_model}, {cfg.n_heads} heads, {norms}. "
        "Sums on this page were checked against the numbers that the model itself computed"
        + (", with what is not affine held." if build.holds(model) else "."),
        sections,
        footer=f"lnfree_interp; torch {torch.__version__}; {text}, {tokens.numel():,} tokens",
    )
    return write_new_file(target, content)


def _shown(original: str) -> str:
    return "the bundled checkpoint" if original == str(bundled_checkpoint()) else original


def _questions(job: ReportJob, model: HookedTransformer) -> list[Question]:
    if job.prompt is not None and job.answer is not None:
        return [Question(job.prompt, job.answer, job.foil)]
    return build.default_questions(model)[-2:]
