"""Which recipes diverge: share of runs that blow up over a grid of learning rates and gaps.

    python benchmarks/removal_robustness.py [--seeds 0 1] [--json FILE]

Short runs on the bundled model with small batches, which are harder than a recipe's own setting. A
run has diverged if the guard stopped it (loss not a number, or `above_best` over the lowest), or if
its loss over the last ten steps is more than half a nat above the original's. The gap is the number
of steps between two events; 0 is all at once. Every cell is the same text in the same order.
"""

import json
import math
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from transformer_lens import HookedTransformer
from transformers.utils import logging

import lnfree_interp as lf
from lnfree_interp.errors import TrainingError
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import Event, published_order, taper
from lnfree_interp.removal.settings import Guard, Statistics

RECIPES = ("published style", "with KL 1", "without auxiliary loss", "taper", "taper, KL 1")


@dataclass(frozen=True)
class Cell:
    """One run."""

    recipe: str
    lr: float
    gap: int
    seed: int
    loss: float
    """Mean of the last ten steps, in nats per token."""
    diverged: bool


def schedule(name: str, model: HookedTransformer, gap: int) -> tuple[Event, ...]:
    """The events: one after the other, or fading over as many steps as those take."""
    one_by_one = published_order(model, start=10, ln2_gap=gap, qk_gap=gap, v_gap=gap)
    if not name.startswith("taper"):
        return one_by_one
    return taper(model, start=10, over=one_by_one[-1].step - 10)


def recipe_of(
    name: str, model: HookedTransformer, *, lr: float, gap: int, steps: int, seed: int
) -> Recipe:
    """A recipe at one point of the grid."""
    return Recipe(
        name=name,
        events=schedule(name, model, gap),
        steps=steps,
        batch=8,
        lr=lr,
        warmup=8,
        final_lr=0.5,
        betas=(0.9, 0.999),
        distillation=1.0 if "KL" in name else 0.0,
        scale_anchor=0.0 if "without auxiliary" in name else 0.1,
        anchor_target="frozen" if name.startswith("taper") else "batch",
        statistics=Statistics(source="ema", momentum=0.5, sequences=8),
        guard=Guard(above_best=6.0),
        seed=seed,
    )


def main(
    seeds: tuple[int, ...] = (0, 1),
    lrs: tuple[float, ...] = (6e-4, 2e-3, 6e-3),
    gaps: tuple[int, ...] = (0, 1, 3),
    steps: int = 70,
    sequence_length: int = 128,
    out: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Run the benchmark.

    Args:
        seeds: Random seeds of the order of the text.
        lrs: Peak learning rates.
        gaps: Steps between two events.
        steps: Steps of every run.
        sequence_length: Tokens per sequence.
        out: Also write all runs there.
    """
    logging.disable_progress_bar()
    model = lf.load(lf.bundled_checkpoint(), device="cpu")
    text = lf.pack(lf.stdlib_corpus("train"), model.tokenizer, sequence_length)
    original = lf.evaluate_loss(model, text[:200]).mean
    cells: list[Cell] = []
    header = " | ".join(f"lr {lr:g}, gap {gap}" for lr in lrs for gap in gaps)
    print(f"| recipe | {header} | diverged |", flush=True)
    print(f"|---|{'---|' * (len(lrs) * len(gaps) + 1)}", flush=True)
    for name in RECIPES:
        entries = []
        for lr in lrs:
            for gap in gaps:
                runs = [
                    one(model, text, original, name, lr=lr, gap=gap, steps=steps, seed=seed)
                    for seed in seeds
                ]
                cells += runs
                whole = [run.loss for run in runs if not run.diverged]
                bad = len(runs) - len(whole)
                entries.append(f"{bad} of {len(runs)}" if bad else f"{sum(whole) / len(whole):.2f}")
        ours = [cell for cell in cells if cell.recipe == name]
        share = sum(cell.diverged for cell in ours) / len(ours)
        print(f"| {name} | {' | '.join(entries)} | {share:.0%} |", flush=True)
        if out is not None:
            out.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    print(
        f"loss of the last ten steps, or how many diverged; original {original:.2f}; {steps} steps "
        f"of {8 * sequence_length} tokens; seeds {seeds}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads of "
        f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}"
    )


def one(
    model: HookedTransformer,
    text: torch.Tensor,
    original: float,
    name: str,
    *,
    lr: float,
    gap: int,
    steps: int,
    seed: int,
) -> Cell:
    """A run and its verdict."""
    recipe = recipe_of(name, model, lr=lr, gap=gap, steps=steps, seed=seed)
    recipe = replace(recipe, micro_batch=8)
    try:
        run = lf.remove_norms(model, recipe, text, progress=False, log_every=5)
        loss = sum(record.loss for record in run.history[-10:]) / 10
    except TrainingError:
        loss = math.inf
    return Cell(name, lr, gap, seed, loss, not loss < original + 0.5)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
