"""The sections of a page about a model: training, quality, attribution, logits, exactness."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from transformer_lens import HookedTransformer

from lnfree_interp import plots
from lnfree_interp.analysis.affine import affine_map
from lnfree_interp.analysis.attribute import attribute_logits
from lnfree_interp.analysis.certificates import Certificate, describe_held
from lnfree_interp.analysis.flow import flow_graph
from lnfree_interp.analysis.lens import logit_lens
from lnfree_interp.analysis.results import Contributions
from lnfree_interp.analysis.scores import attribute_scores
from lnfree_interp.analysis.trace import Trace, trace
from lnfree_interp.analysis.view import view_of
from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.results import Evaluation
from lnfree_interp.models.sites import live_sites
from lnfree_interp.numerics import MeasuredError
from lnfree_interp.plots.page import Section
from lnfree_interp.removal.run import StepRecord
from lnfree_interp.tables import Table

PROMPTS: tuple[tuple[str, str, str], ...] = (
    ("for i in", " range", " self"),
    ("    if value is not", " None", " True"),
    ("try:\n    number = int(text)\nexcept", " ValueError", " KeyError"),
    (
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n"
        "    def push(self, item):\n        self.items.append(",
        "item",
        "self",
    ),
)
"""Prompts about Python source: prompt, answer, and the token that the answer is compared with."""


@dataclass(frozen=True)
class Question:
    """A logit, or a difference of two, to explain."""

    prompt: str
    answer: str | int
    foil: str | int | None = None


def default_questions(model: HookedTransformer) -> list[Question]:
    """`PROMPTS`, with the first token of answer and foil.

    Left out are prompts that are longer than the context, and those whose answer and foil begin
    with the same token.
    """
    if model.tokenizer is None:
        return []

    def tokens(text: str) -> list[int]:
        return model.to_tokens(text, prepend_bos=False, truncate=False)[0].tolist()

    found = [Question(prompt, tokens(a)[0], tokens(b)[0]) for prompt, a, b in PROMPTS]
    return [
        question
        for question in found
        if question.answer != question.foil and len(tokens(question.prompt)) < model.cfg.n_ctx
    ]


def holds(model: HookedTransformer) -> bool:
    """Whether something in the model is not affine, so that questions have to hold it."""
    if live_sites(model):  # some of them may be in the way of any view
        return True
    view = view_of(model)
    return bool(view.logit_cap or view.score_cap)


def traced(model: HookedTransformer, questions: Question | Sequence[Question]) -> Trace:
    """The forward pass over the prompts of some questions; what is not affine is held."""
    several = not isinstance(questions, Question)
    prompts = [q.prompt for q in questions] if several else questions.prompt
    return trace(model, prompts, hold=holds(model))


def attributions(
    model: HookedTransformer, questions: Sequence[Question], levels: Iterable[str]
) -> tuple[Contributions, ...]:
    """The parts of logit differences at several levels, from one run. Their sums are verified.

    Args:
        model: The model to explain; what is not affine in it is held.
        questions: Questions that all have a foil.
        levels: The levels' names.

    Raises:
        InexactError: if the parts do not add up to the logits.
    """
    one = traced(model, questions)
    answers, foils = ([getattr(q, name) for q in questions] for name in ("answer", "foil"))
    found = tuple(attribute_logits(one, answers, foils, by=by) for by in levels)
    for result in found:
        result.certificate.require()
    return found


def training(runs: Mapping[str, Sequence[StepRecord]], note: str = "") -> list[Section]:
    """The loss of some runs, and how far the inputs of frozen sites have moved.

    Args:
        runs: The steps of each run by the name of its model.
        note: Text to add.

    Returns:
        One section; none without runs.
    """
    runs = {name: steps for name, steps in runs.items() if steps}
    if not runs:
        return []
    removal = max(runs.values(), key=_n_frozen)
    figures: list[go.Figure] = [plots.training_curve(runs)]
    if any(record.probes.get("drift") for record in removal):
        figures.append(plots.sigma_drift(removal))
    text = f"{len(removal)} steps, in which {_n_frozen(removal)} norm sites were frozen."
    heading = "Removing the norms" if _n_frozen(removal) else "Training"
    return [Section(heading, f"{text} {note}".rstrip(), figures)]


def _n_frozen(steps: Sequence[StepRecord]) -> int:
    return sum(len(record.frozen) for record in steps)


def quality(evaluation: Evaluation, note: str = "") -> list[Section]:
    """Whether the models predict text as well as their original, and whether attribution is true.

    Args:
        evaluation: The evaluation of the models.
        note: Text to add.

    Returns:
        A section about the loss, and one about attribution if it was measured.
    """
    text = (
        "Cross-entropies, entropies and divergences are in nats per token. A few tokens can change "
        "the mean, so look at the other figures too."
    )
    curves = [plots.loss_by_position(evaluation), plots.residual_norms(evaluation)]
    sections = [
        Section(
            "Is it still the same model?", f"{text} {note}".rstrip(), [evaluation.table(), *curves]
        )
    ]
    effects = {
        name: model.direct_effects
        for name, model in evaluation.models.items()
        if model.direct_effects is not None
    }
    if effects:
        sections.append(
            Section(
                "Does attribution tell the truth?",
                "What each head adds to the logit of the true next token, against what that logit "
                "loses when the head's output is taken out of the final residual stream. NMAE is "
                "the mean absolute error over the mean absolute effect.",
                [plots.direct_effects(effects)],
            )
        )
    return sections


def logits(attributions: Iterable[Contributions]) -> list[Section]:
    """The parts of some logits at several levels, prompt by prompt.

    Args:
        attributions: One per level, of the same prompts.
    """
    levels = list(attributions)
    figures = [
        plots.attribution(level.select(prompt))
        for prompt in range(len(levels[0].of))
        for level in levels
    ]
    text = "Every sum was verified against the logits that the model computed."
    return [Section("What makes these logits?", text, figures)]


_DRAWN = {"FlowGraph": plots.flow, "ScoreAttribution": plots.scores, "Lens": plots.lens}


def explanation(one: Trace, question: Question) -> Section:
    """One logit by sublayer, head, source token and input token, and how it flows.

    Args:
        one: The forward pass over the question's prompt, see `traced`.
        question: The logit.
    """
    ask = (one, question.answer, question.foil)
    by_source = attribute_logits(*ask, by="source")
    results: list[Any] = [
        attribute_logits(*ask, by="sublayer"), attribute_logits(*ask, by="head"), by_source,
        affine_map(*ask), flow_graph(*ask, top_k=30),
    ]  # fmt: skip
    layer, head = _largest_head(by_source)
    explained = one.view.explains_scores and one.view.weighing(layer) == "softmax"
    if layer > 0 and explained:
        results.append(attribute_scores(one, layer, head))
    results.append(logit_lens(one))
    figures = []
    for result in results:
        result.certificate.require()
        draw = _DRAWN.get(type(result).__name__, plots.attribution)
        figures.append(draw(result))
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


def errors_table(errors: Mapping[str, MeasuredError]) -> Table:
    """Measured errors by what they are of."""
    rows = [
        [what, f"{error.relative:.1e}", f"{error.absolute:.1e}"] for what, error in errors.items()
    ]
    return Table(["largest error", "relative", "absolute"], rows)


def certificates_table(certificates: Iterable[Certificate]) -> Table:
    """Identities and their errors."""
    rows = [
        [
            certificate.identity,
            f"{certificate.error.relative:.1e}",
            f"{certificate.error.tolerance:.0e}",
            "yes" if certificate.holds else "NO",
            describe_held(certificate.held, certificate.gap).removeprefix(" with ") or "nothing",
        ]
        for certificate in certificates
    ]
    return Table(["identity", "error", "tolerance", "holds", "held"], rows)


def exactness(text: str, table: Table) -> Section:
    """How exact the numbers of the page are.

    Args:
        text: What was measured.
        table: From `errors_table` or `certificates_table`.
    """
    return Section("How exact is all this?", text, [table])
