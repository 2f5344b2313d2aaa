"""What does removing every norm cost? LN-free minus vanilla control, over several seeds.

    python benchmarks/removal_gap.py [--seeds 0 1 2] [--steps 250] [--distillation 0.5]
        [--json FILE]

For each seed: remove all norms from the bundled checkpoint, run the control (same steps, data order
and learning rates, nothing removed), and evaluate both on the held-out modules of the standard
library. Prints the table of docs/benchmarks.md.
"""

import json
import platform
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from transformer_lens import HookedTransformer
from transformers.utils import logging

import lnfree_interp as lf


@dataclass(frozen=True)
class Row:
    """One seed."""

    seed: int
    vanilla: float
    lnfree: float
    gap: float
    median_gap: float
    p99_gap: float
    seconds_vanilla: float
    seconds_lnfree: float


def run_seed(
    model: HookedTransformer,
    text: dict[str, torch.Tensor],
    steps: int,
    seed: int,
    distillation: float,
) -> Row:
    """Removal and control of one seed."""
    recipe = replace(
        lf.recipes.demo(model.cfg.n_layers, steps=steps, seed=seed), distillation=distillation
    )
    run = lf.remove_norms(model, recipe, text["train"])
    control = lf.remove_norms(model, recipe.vanilla(), text["train"])
    lnfree = lf.evaluate_loss(lf.fold(run.model), text["heldout"])
    vanilla = lf.evaluate_loss(control.model, text["heldout"])
    return Row(
        seed=seed,
        vanilla=vanilla.mean,
        lnfree=lnfree.mean,
        gap=lnfree.mean - vanilla.mean,
        median_gap=lnfree.median - vanilla.median,
        p99_gap=lnfree.p99 - vanilla.p99,
        seconds_vanilla=control.seconds,
        seconds_lnfree=run.seconds,
    )


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 250,
    distillation: float = 0.5,
    out: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Run the benchmark.

    Args:
        seeds: Of the data order.
        steps: Optimiser steps of each run.
        distillation: Share of the removal's loss that is distillation from the original.
        out: Also write the rows there.
    """
    logging.disable_progress_bar()
    model = lf.load(lf.bundled_checkpoint())
    text = {
        split: lf.pack(lf.stdlib_corpus(split), model.tokenizer, model.cfg.n_ctx)
        for split in ("train", "heldout")
    }
    original = lf.evaluate_loss(model, text["heldout"])
    rows = []
    print(f"original, held-out: {original.mean:.4f} nats per token", flush=True)
    header = "| seed | vanilla | LN-free | gap of means | gap of medians | gap of p99 | seconds |"
    print(f"{header}\n|---|---|---|---|---|---|---|", flush=True)
    for seed in seeds:
        row = run_seed(model, text, steps, seed, distillation)
        rows.append(row)
        print(
            f"| {row.seed} | {row.vanilla:.4f} | {row.lnfree:.4f} | {row.gap:+.4f} | "
            f"{row.median_gap:+.4f} | {row.p99_gap:+.3f} | "
            f"{row.seconds_vanilla:.0f} + {row.seconds_lnfree:.0f} |",
            flush=True,
        )
    gaps = [row.gap for row in rows]
    spread = statistics.stdev(gaps) if len(gaps) > 1 else float("nan")
    print(f"gap: mean {statistics.mean(gaps):+.4f}, standard deviation {spread:.4f} nats per token")
    print(
        f"distillation {distillation}; "
        f"{steps} steps of {recipe.batch * model.cfg.n_ctx} tokens; "
        f"{text['heldout'].numel()} held-out tokens; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}"
    )
    if out is not None:
        result = {"original": original.mean, "steps": steps, "rows": [vars(row) for row in rows]}
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
