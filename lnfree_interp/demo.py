"""The whole path on real input: load, remove, fold, evaluate, attribute, export, report."""

import copy
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens import HookedTransformer

from lnfree_interp import plots
from lnfree_interp.analysis.contributions import Contributions, Level
from lnfree_interp.analysis.logits import attribute_logits
from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.checkpoints.loading import load, load_checkpoint
from lnfree_interp.checkpoints.source import open_in_transformers
from lnfree_interp.data.named import spread
from lnfree_interp.data.packing import pack
from lnfree_interp.data.stdlib import stdlib_corpus
from lnfree_interp.errors import DataError, RecipeError
from lnfree_interp.evaluation.direct_effects import DirectEffects, direct_effects
from lnfree_interp.evaluation.loss import CrossEntropy, evaluate_loss
from lnfree_interp.files import anywhere, new_folder, require_writable
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.forms import fold
from lnfree_interp.numerics import MeasuredError
from lnfree_interp.plots.page import Section, page
from lnfree_interp.plots.style import MODEL_NAMES
from lnfree_interp.removal import recipes
from lnfree_interp.removal.job import write_finished
from lnfree_interp.removal.remove import remove_norms
from lnfree_interp.removal.run import Run
from lnfree_interp.tables import Table

LEVELS: tuple[Level, ...] = ("block", "head", "neuron")

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
"""Prompt, answer, and the token that the answer is compared with."""

DIRECT_EFFECT_SEQUENCES = 16
"""Held-out sequences on which every head's direct effect is measured."""


@dataclass(frozen=True)
class Demo:
    """What the demo found. Dictionaries by model: `original`, `vanilla`, `lnfree`."""

    run: Run
    control: Run
    lnfree: HookedTransformer
    losses: dict[str, CrossEntropy]
    effects: dict[str, DirectEffects]
    attributions: dict[Level, Contributions]
    errors: dict[str, MeasuredError]
    """Of loading, folding and decomposing; in float32, and in float64 where named so."""
    seconds: float

    @property
    def gap(self) -> float:
        """Held-out cross-entropy, LN-free minus vanilla, in nats per token."""
        return self.losses["lnfree"].mean - self.losses["vanilla"].mean

    def tables(self) -> dict[str, Table]:
        """The same tables for terminal and report."""
        quality = Table(
            ["held-out, nats per token", "mean", "median", "p99"],
            [
                [MODEL_NAMES[name], f"{x.mean:.4f}", f"{x.median:.4f}", f"{x.p99:.3f}"]
                for name, x in self.losses.items()
            ],
        )
        nmae = Table(
            ["attribution against direct effect", "NMAE per head", "NMAE pooled"],
            [
                [MODEL_NAMES[name], _percent(x.nmae), _percent(x.pooled_nmae)]
                for name, x in self.effects.items()
            ],
        )
        exact = Table(
            ["largest error", "relative", "absolute"],
            [
                [what.replace("_", ", "), f"{e.relative:.1e}", f"{e.absolute:.1e}"]
                for what, e in self.errors.items()
            ],
        )
        return {"quality": quality, "attribution": nmae, "exactness": exact}


def run_demo(
    out: str | os.PathLike[str] = "lnfree-demo",
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    steps: int = 250,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Demo:
    """Remove every norm from a pretrained model, check everything, and write a folder.

    Args:
        out: A folder that does not exist yet or is empty; it appears when it is complete, with
            `model/`, its `control/` with norms, `metrics.json` and `report.html`.
        checkpoint: Hub id or local folder. Default: the bundled checkpoint.
        steps: Optimiser steps, for the removal and again for its control.
        seed: Of the data order.
        progress: Whether to show progress bars.
        say: Gets a line before and after each stage.

    Raises:
        LnfreeError: whatever `load`, `remove_norms`, `fold`, `attribute_logits` and `export` raise.
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
        raise DataError(f"{source}: the demo starts from a checkpoint of transformers")
    errors["load"] = loaded.error
    say(f"    largest logit difference from transformers: {errors['load']}")
    questions = readable_prompts(original)
    if not questions:
        raise DataError(f"{source}: its tokenizer cannot tell the demo's answers apart")
    sequence_length = min(original.cfg.n_ctx, 256)
    text = {
        split: pack(stdlib_corpus(split), original.tokenizer, sequence_length)
        for split in ("train", "heldout")
    }

    recipe = recipes.distilled(original, steps=steps, seed=seed)
    say(
        f"2/6 removing {len(recipe.events)} norm sites in {steps} steps of "
        f"{recipe.batch * block} tokens, then the control without removal"
    )
    run = remove_norms(original, recipe, text["train"], progress=progress)
    control = remove_norms(original, recipe.vanilla(), text["train"], progress=progress)

    say("3/6 folding the frozen norms into the weights")
    lnfree = fold(run.model)
    errors["fold"] = compare_logits(lnfree, run.model)
    say(f"    largest logit difference from the frozen model: {errors['fold']}")

    say(f"4/6 evaluating on {text['heldout'].numel():,} held-out tokens")
    models = {"original": original, "vanilla": control.model, "lnfree": lnfree}
    losses = {name: evaluate_loss(model, text["heldout"]) for name, model in models.items()}
    sample = spread(text["heldout"], DIRECT_EFFECT_SEQUENCES)
    effects = {name: direct_effects(model, sample) for name, model in models.items()}

    say(f"5/6 taking {len(questions)} logit differences apart by block, head and neuron")
    attributions = decompose_prompts(lnfree, questions)
    errors["decomposition"] = _worst(attributions)
    frozen64 = copy.deepcopy(run.model).to(torch.float64, print_details=False)
    lnfree64 = fold(frozen64)
    errors["fold_float64"] = compare_logits(lnfree64, frozen64)
    errors["decomposition_float64"] = _worst(decompose_prompts(lnfree64, questions))

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
        demo = Demo(
            run, control, lnfree, losses, effects, attributions, errors, time.monotonic() - began
        )
        plain = metrics(demo) | {"source": None if checkpoint is None else anywhere(checkpoint)}
        (folder / "metrics.json").write_text(json.dumps(plain, indent=1) + "\n")
        (folder / "report.html").write_text(report(demo), encoding="utf-8")
    return demo


def readable_prompts(model: HookedTransformer) -> list[tuple[str, int, int]]:
    """The demo's prompts with the first token of answer and foil, where the tokenizer tells them
    apart and the prompt fits into the context."""

    def tokens(text: str) -> list[int]:
        return model.to_tokens(text, prepend_bos=False, truncate=False)[0].tolist()

    found = [(prompt, tokens(answer)[0], tokens(foil)[0]) for prompt, answer, foil in PROMPTS]
    return [
        (prompt, answer, foil)
        for prompt, answer, foil in found
        if answer != foil and len(tokens(prompt)) < model.cfg.n_ctx
    ]


def decompose_prompts(
    model: HookedTransformer, questions: list[tuple[str, int, int]]
) -> dict[Level, Contributions]:
    """Logit differences taken apart at each level, each sum verified.

    Args:
        model: LN-free.
        questions: Prompt, answer and foil.

    Raises:
        InexactError: if the parts do not add up to the logits.
    """
    prompts, answers, foils = (list(column) for column in zip(*questions, strict=True))
    return {
        level: attribute_logits(model, prompts, answers, foils, by=level).verify()
        for level in LEVELS
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.001 else f"{100 * share:.1f} %"


def _worst(attributions: dict[Level, Contributions]) -> MeasuredError:
    return max((result.error for result in attributions.values()), key=lambda e: e.relative)


def metrics(demo: Demo) -> dict[str, Any]:
    """The demo's numbers, as they go into `metrics.json`."""
    exactness = {"": {}, "_float64": {}}
    for what, error in demo.errors.items():
        name, _, dtype = what.partition("_")
        exactness[f"_{dtype}" if dtype else ""][name] = error.relative
    recipe = demo.run.recipe
    return {
        "cross_entropy": {
            name: {"mean": x.mean, "median": x.median, "p99": x.p99}
            for name, x in demo.losses.items()
        },
        "gap_to_vanilla": demo.gap,
        "dla_nmae": {name: x.nmae for name, x in demo.effects.items()},
        "dla_nmae_pooled": {name: x.pooled_nmae for name, x in demo.effects.items()},
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
    """The demo's findings as one self-contained HTML page."""
    tables = demo.tables()
    figures = []
    for prompt in range(len(demo.attributions["block"].of)):
        for level in LEVELS:
            figures.append(plots.attribution(demo.attributions[level].select(prompt)))
    n_sites, recipe = len(demo.run.recipe.events), demo.run.recipe
    sections = [
        Section(
            "Removing the norms",
            f"{n_sites} norm sites were frozen one after the other, each at the mean standard "
            "deviation of its input at that moment. The control saw the same text in the same "
            "order at the same learning rates, and kept its norms; unlike it, the removal distils "
            f"from the original with {recipe.distillation:.0%} of its loss.",
            [plots.training_curve({"vanilla": demo.control, "lnfree": demo.run})],
        ),
        Section(
            "Is it still the same model?",
            f"Cross-entropy on held-out text. LN-free minus vanilla: {demo.gap:+.4f} nats.",
            [tables["quality"]],
        ),
        Section(
            "Does attribution tell the truth?",
            "A head's attribution against the change of the true next token's logit when its "
            "output is taken out of the final residual stream. NMAE is the mean absolute error "
            "over the mean absolute effect.",
            [tables["attribution"], plots.direct_effects(demo.effects)],
        ),
        Section(
            "What makes these logits?",
            "Logit differences of the LN-free model. Every sum has been verified against the "
            "logits that the model computed.",
            figures,
        ),
        Section(
            "How exact is all this?",
            "Largest differences found: against transformers when loading; folded against frozen "
            "model; sum of parts against logit; exported folder in transformers.",
            [tables["exactness"]],
        ),
    ]
    return page(
        "Removing LayerNorm: a demo",
        f"A pretrained {demo.lnfree.cfg.n_layers}-layer GPT-2 lost all {n_sites} norm sites in "
        f"{recipe.steps} steps of fine-tuning. Its residual stream is now linear, so a logit is a "
        "sum of parts.",
        sections,
        footer=f"seed {recipe.seed}; {demo.seconds:.0f} seconds; {metrics(demo)['hardware']}",
    )
