"""Runs `lnfree freeze`: from names to a folder with a model on which questions are exact."""

import os
from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.flow import flow_graph
from lnfree_interp.analysis.logit_targets import NextTokens
from lnfree_interp.analysis.norms_read import Question, norms_read
from lnfree_interp.analysis.paths import expand_paths
from lnfree_interp.analysis.score_targets import Score
from lnfree_interp.analysis.targets import Neuron
from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.checkpoints.exporting import export
from lnfree_interp.checkpoints.loading import load
from lnfree_interp.data.named import evaluation_text
from lnfree_interp.errors import DataError, LnfreeError
from lnfree_interp.files import require_writable
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.removal.freeze_for import FrozenFor, freeze_for
from lnfree_interp.removal.freeze_options import FreezeJob

ANY_TOKEN = 0
"""Which logit is asked for does not matter for the norms that it is read through."""

_NAMED: dict[str, Question] = {
    "logits": NextTokens(),
    "paths": lambda trace: expand_paths(trace, ANY_TOKEN),
    "flow": lambda trace: flow_graph(trace, ANY_TOKEN),
}


def run_job(
    job: FreezeJob,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> FrozenFor:
    """Load a model, freeze what the questions read through, and write it.

    Args:
        job: What to do.
        out: A new folder for the model, in TransformerLens' layout. The training, if there is any,
            keeps its checkpoints and metrics in a folder beside it, `OUT-training`.
        resume: Continue the training in that folder.
        progress: Whether to show progress bars.
        say: Is given a line before each stage.

    Raises:
        DataError: if there is no such question, or the text cannot be read.
        RecipeError: if a training is to be continued and there are no steps.
        LnfreeError: for what `load`, `freeze_for` and `export` refuse.
    """
    require_writable(out)
    questions = [read_question(word) for word in job.question]
    source = str(bundled_checkpoint()) if job.model is None else job.model
    say(f"loading {'the bundled checkpoint' if job.model is None else source}")
    model = load(source, revision=job.revision)
    length = job.sequence_length or min(1024, model.cfg.n_ctx)
    say(f"opening {job.text}")
    tokens = evaluation_text(
        job.text, model.tokenizer, length, job.sequences, split=job.split, name=job.data_name,
        column=job.column, revision=job.data_revision,
    )  # fmt: skip
    sites = [site for one in questions for site in _sites(model, one, tokens)]
    found = freeze_for(
        model, sites, tokens, job.steps, first=not job.one_constant, lr=job.lr, batch=job.batch,
        out=f"{os.fspath(out)}-training" if job.steps else None, resume=resume, progress=progress,
    )  # fmt: skip
    say(str(found))
    recipe = None if found.run is None else found.run.recipe
    export(found.model, out, target="transformer_lens", recipe=recipe, source=source)
    return found


def read_question(word: str) -> Question | NormSite:
    """The question that a word of the command line stands for.

    Raises:
        DataError: if there is none.
    """
    if word in _NAMED:
        return _NAMED[word]
    try:
        return _read_label(word)
    except LnfreeError as error:
        raise DataError(
            f"{word!r} is no question: give {', '.join(_NAMED)}, a head such as L23H3, a neuron "
            "such as L5N310, or a norm site such as ln_final or blocks.23.ln1.qk"
        ) from error


def _read_label(word: str) -> Question | NormSite:
    if not word.startswith("L"):
        return NormSite.parse(word)
    one = Component.parse(word)
    kinds = {"head": Score, "neuron": Neuron}
    if one.kind not in kinds or one.pos is not None or one.through:
        raise DataError(f"{word} is neither a head nor a neuron")
    return kinds[one.kind](one.layer, one.index)


def _sites(
    model: HookedTransformer, question: Question | NormSite, tokens: Int[Tensor, "sequence pos"]
) -> tuple[NormSite, ...]:
    if isinstance(question, NormSite):
        return (question,)
    return norms_read(model, tokens[0], question)
