"""`lnfree demo`: load, remove, fold, evaluate, attribute, export and report."""

import copy
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.results import Contributions
from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.checkpoints.loading import load, load_checkpoint
from lnfree_interp.checkpoints.source import open_in_transformers
from lnfree_interp.data.packing import pack
from lnfree_interp.data.stdlib import stdlib_corpus
from lnfree_interp.errors import DataError, RecipeError
from lnfree_interp.evaluation.evaluate import evaluate
from lnfree_interp.evaluation.results import Evaluation
from lnfree_interp.files import anywhere, new_folder, require_writable
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.forms import fold
from lnfree_interp.numerics import MeasuredError
from lnfree_interp.plots.page import page
from lnfree_interp.removal import recipes
from lnfree_interp.removal.remove import remove_norms
from lnfree_interp.removal.run import Run
from lnfree_interp.removal.run_job import write_finished
from lnfree_interp.report import sections as build
from lnfree_interp.tables import Table

LEVELS = ("sublayer", "head", "neuron")
EVERY = 3
"""One of this many held-out sequences is evaluated: a third of the time, from every module."""


@dataclass(frozen=True)
class Demo:
    """What the demo found."""

    run: Run
    control: Run
    lnfree: HookedTransformer
    evaluation: Evaluation
    """The evaluation of `original`, `vanilla` and `lnfree` on held-out text."""
    attributions: tuple[Contributions, ...]
    """The demo's logit differences at each of `LEVELS`."""
    errors: dict[str, MeasuredError]
    """The errors of loading, folding, decomposing and exporting; some are named as float64."""
    seconds: float

    @property
    def gap(self) -> float:
        """Held-out cross-entropy, LN-free minus vanilla, in nats per token."""
        found = self.evaluation.models
        return found["lnfree"].cross_entropy.mean - found["vanilla"].cross_entropy.mean

    def tables(self) -> list[Table]:
        """The tables of the report."""
        named = {what.replace("_", ", "): error for what, error in self.errors.items()}
        return [self.evaluation.table(), build.errors_table(named)]


def run_demo(
    out: str | os.PathLike[str] = "lnfree-demo",
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    steps: int = 250,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Demo:
    """Remove every norm from a pretrained model, check the result, and write a folder.

    Args:
        out: A new or empty folder. It is written at the end, with `model/`, `control/`, which keeps
            its norms, `metrics.json` and `report.html`.
        checkpoint: Hub id or local folder. Default: the bundled checkpoint.
        steps: Optimiser steps of the removal, and of its control.
        seed: The random seed of the order of the text.
        progress: Whether to show progress bars.
        say: Is given a line before and after each stage.

    Returns:
        What was found.

    Raises:
        LnfreeError: for what `load`, `remove_norms`, `fold`, `attribute_logits` and `export`
            refuse.
    """
    began = time.monotonic()
    require_writable(out)
    if steps < 1:
        raise RecipeError(f"steps must be positive, not {steps}")
    source = bundled_checkpoint() if checkpoint is None else checkpoint
    errors: dict[str, MeasuredError] = {}

    say(f"1/6 loading {source}")
    loaded = load_checkpoint(source)
    original = loaded.model
    if loaded.error is None or loaded.format == "TransformerLens' own layout":
        raise DataError(f"{source} is not a checkpoint of transformers, which the demo needs")
    errors["load"] = loaded.error
    say(f"    largest logit difference from transformers: {errors['load']}")
    questions = build.default_questions(original)
    if not questions:
        raise DataError(f"the tokenizer of {source} does not tell the demo's answers apart")
    sequence_length = min(original.cfg.n_ctx, 256)
    text = {
        split: pack(stdlib_corpus(split), original.tokenizer, sequence_length)
        for split in ("train", "heldout")
    }

    recipe = recipes.distilled(original, steps=steps, seed=seed)
    say(
        f"2/6 removing {len(recipe.events)} norm sites in {steps} steps of "
        f"{recipe.batch * sequence_length} tokens, then the control without removal"
    )
    run = remove_norms(original, recipe, text["train"], progress=progress)
    control = remove_norms(original, recipe.vanilla(), text["train"], progress=progress)

    say("3/6 folding the frozen norms into the weights")
    lnfree = fold(run.model)
    errors["fold"] = compare_logits(lnfree, run.model)
    say(f"    largest logit difference from the frozen model: {errors['fold']}")

    heldout = text["heldout"][::EVERY]
    say(f"4/6 evaluating on {heldout.numel():,} held-out tokens")
    models = {"original": original, "vanilla": control.model, "lnfree": lnfree}
    evaluation = evaluate(
        models, heldout, original="original", text="held-out text", neurons=0, pairs=0,
        progress=progress,
    )  # fmt: skip

    say(f"5/6 taking {len(questions)} logit differences apart by sublayer, head and neuron")
    attributions = build.attributions(lnfree, questions, LEVELS)
    errors["decomposition"] = _worst(attributions)
    frozen64 = copy.deepcopy(run.model).to(torch.float64, print_details=False)
    lnfree64 = fold(frozen64)
    errors["fold_float64"] = compare_logits(lnfree64, frozen64)
    errors["decomposition_float64"] = _worst(build.attributions(lnfree64, questions, LEVELS))

    say("6/6 writing the model and the report")
    with new_folder(out) as folder:
        written = {
            "HookedTransformer against transformers": errors["load"],
            "folded against frozen norms": errors["fold"],
        }
        name = str(source) if checkpoint else "bundled checkpoint"
        target = write_finished(run, lnfree, folder / "model", source=name, errors=written)
        write_finished(
            control, None, folder / "control", source=name, errors={"load": errors["load"]}
        )
        if target == "transformers":
            exported, _ = open_in_transformers(folder / "model", device=lnfree.W_E.device)
        else:
            exported = load(folder / "model")
        errors["export"] = compare_logits(exported, lnfree).require("exported folder")
        seconds = time.monotonic() - began
        demo = Demo(run, control, lnfree, evaluation, attributions, errors, seconds)
        plain = metrics(demo) | {"source": None if checkpoint is None else anywhere(checkpoint)}
        (folder / "metrics.json").write_text(json.dumps(plain, indent=1) + "\n")
        (folder / "report.html").write_text(report(demo), encoding="utf-8")
    return demo


def _worst(attributions: Iterable[Contributions]) -> MeasuredError:
    return max((result.error for result in attributions), key=lambda error: error.relative)


def metrics(demo: Demo) -> dict[str, Any]:
    """The demo's numbers, as they go into `metrics.json`."""
    exactness = {"": {}, "_float64": {}}
    for what, error in demo.errors.items():
        name, _, dtype = what.partition("_")
        exactness[f"_{dtype}" if dtype else ""][name] = error.relative
    recipe, found = demo.run.recipe, demo.evaluation.models
    losses = {name: model.cross_entropy for name, model in found.items()}
    effects = {name: model.direct_effects for name, model in found.items() if model.direct_effects}
    return {
        "cross_entropy": {
            name: {"mean": loss.mean, "median": loss.median, "p99": loss.p99}
            for name, loss in losses.items()
        },
        "gap_to_vanilla": demo.gap,
        "dla_nmae": {name: x.nmae for name, x in effects.items()},
        "dla_nmae_pooled": {name: x.pooled_nmae for name, x in effects.items()},
        "max_relative_error": exactness[""],
        "max_relative_error_float64": exactness["_float64"],
        "seconds": round(demo.seconds, 1),
        "training_seconds": {
            "lnfree": round(demo.run.seconds, 1),
            "vanilla": round(demo.control.seconds, 1),
        },
        "seed": recipe.seed,
        "steps": recipe.steps,
        "sigma": {site: s for record in demo.run.history for site, s in record.frozen.items()},
        "hardware": (
            f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        ),
    }


def report(demo: Demo) -> str:
    """The demo's findings as one HTML page that needs no network."""
    n_sites, recipe = len(demo.run.recipe.events), demo.run.recipe
    removal = (
        "Each was frozen at the mean standard deviation of its input at that moment. The control "
        "saw the same text in the same order at the same learning rates, and kept its norms. The "
        f"removal has the KL divergence from the original in {recipe.distillation:.0%} of its loss."
    )
    exact = (
        "The largest differences that were found: between transformers and the loaded model; "
        "between the folded and the frozen model; between the sum of parts and the logit; between "
        "the exported folder in transformers and the folded model."
    )
    sections = [
        *build.training({"vanilla": demo.control.history, "lnfree": demo.run.history}, removal),
        *build.quality(demo.evaluation, f"LN-free minus vanilla: {demo.gap:+.4f} nats."),
        *build.logits(demo.attributions),
        build.exactness(exact, demo.tables()[1]),
    ]
    return page(
        "Removing LayerNorm: a demo",
        f"A pretrained {demo.lnfree.cfg.n_layers}-layer model lost all {n_sites} norm sites in "
        f"{recipe.steps} steps of fine-tuning. Its residual stream is now linear, so a logit is a "
        "sum of parts.",
        sections,
        footer=f"seed {recipe.seed}; {demo.seconds:.0f} seconds; {metrics(demo)['hardware']}",
    )
