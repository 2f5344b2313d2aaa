"""Linear attention in a model that was trained with softmax: what transferred weights bring.

    python benchmarks/linear_attention.py rows.jsonl

The bundled model's architecture with linear attention in blocks 0 and 3 (the second and the middle
block keep their softmax, as in arXiv 2404.02684), trained on the standard library's source from
different starts, with equal tokens and text. Each start has its own best learning rate: the one of
`--rates` with the lowest loss on text that is neither trained nor held out, with the first seed.
Finished runs are lines of `rows.jsonl` and are not repeated.
"""

import math
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from seeds import Rows, spread
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers.utils import logging
from tyro.conf import Positional

import lnfree_interp as lf
from lnfree_interp.tuning.transfer import Transfer

LENGTH, LAYERS = 128, (0, 3)
MIXERS = ["blocks.[03].attn.*"]
STILL = (lf.Release(trainable="all", window=15, less_than=0.05),)
Start = tuple[HookedTransformer, dict[str, Any]]


def starts(source: HookedTransformer, text: Tensor) -> dict[str, Callable[[int], Start]]:
    """A model and settings of its recipe, by name and seed."""
    scaled = lf.to_linear_attention(source, LAYERS, divide_by="count", tokens=text[:32]).model

    def target(seed: int, divide_by: str) -> HookedTransformer:
        new = lf.untrained(source, seed=seed)
        return lf.to_linear_attention(new, LAYERS, divide_by=divide_by).model

    def transferred(seed: int, divide_by: str, leave: list[str]) -> Transfer:
        return lf.transfer_weights(source, target(seed, divide_by), leave=leave)

    def released(seed: int) -> Start:
        transfer = transferred(seed, "sum", MIXERS)
        return transfer.model, {"trainable": transfer.fresh, "release": STILL}

    return {
        "softmax in all blocks, all new": lambda seed: (lf.untrained(source, seed=seed), {}),
        "all new": lambda seed: (target(seed, "sum"), {}),
        "all but the mixers": lambda seed: (transferred(seed, "sum", MIXERS).model, {}),
        "all but the mixers, which are trained first": released,
        "everything": lambda seed: (transferred(seed, "sum", []).model, {}),
        "divided by the count: all new": lambda seed: (target(seed, "count"), {}),
        "divided by the count: everything, W_O scaled": lambda _: (scaled, {}),
    }


def show(rows: list[dict[str, Any]], source: float) -> None:
    """The table: held-out loss against tokens."""
    points = [point for point, _ in max((row["curve"] for row in rows), key=len)]
    print(f"\n| transferred | rate | {' | '.join(f'{n:,} tokens' for n in points)} | release |")
    print("|" + "---|" * (len(points) + 3))
    for name in dict.fromkeys(row["name"] for row in rows):
        every = [row for row in rows if row["name"] == name]
        of = [row for row in every if row["curve"]]
        if len(of) < len(every):
            name += f" ({len(every) - len(of)} of {len(every)} diverged)"
        if not of:
            print(f"| {name} | {every[0]['lr']:g} | {' | '.join('-' for _ in points)} | |")
            continue
        losses = zip(*([loss for _, loss in row["curve"]] for row in of), strict=True)
        cells = [spread(values) for values in losses]
        at = ", ".join(str(row["released"]) for row in of if row["released"])
        print(f"| {name} | {of[0]['lr']:g} | {' | '.join(cells)} | {at and f'after step {at}'} |")
    print(f"\nThe source, whose softmax was trained on far more text, is at {source:.3f}.")


def main(
    rows: Positional[Path],
    steps: int = 200,
    batch: int = 8,
    seeds: tuple[int, ...] = (0, 1, 2),
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3),
    points: int = 4,
) -> None:
    """Run the benchmark.

    Args:
        rows: The file of finished runs; it is made if it does not exist.
        steps: Steps of each run.
        batch: Sequences of 128 tokens in a step.
        seeds: Seeds of new weights and of the order of the text.
        rates: Peak learning rates, of which each start gets its best.
        points: At how many points of a run the held-out loss is measured.
    """
    logging.disable_progress_bar()
    source = lf.load(lf.bundled_checkpoint(), device="cpu")
    train = lf.pack(lf.stdlib_corpus("train"), source.tokenizer, LENGTH)
    held = lf.pack(lf.stdlib_corpus("heldout"), source.tokenizer, LENGTH)
    validation, heldout = held[::9][:100], held[1::9][:100]
    base = replace(
        lf.recipes.finetuning(steps=steps, batch=batch), evaluate_every=max(steps // points, 1),
        warmup=max(steps // 20, 1),
    )  # fmt: skip
    made = starts(source, train)
    done = Rows(rows)

    def run(name: str, lr: float, seed: int) -> dict[str, Any]:
        about = {"name": name, "lr": lr, "seed": seed, "steps": steps, "batch": batch}
        return done.get(about, lambda: anew(name, lr, seed))

    def anew(name: str, lr: float, seed: int) -> dict[str, Any]:
        model, settings = made[name](seed)
        recipe = replace(base, lr=lr, seed=seed, **settings)
        row: dict[str, Any] = {"validation": math.inf, "curve": [], "released": None}
        try:
            found = lf.finetune(model, recipe, train, heldout=heldout, progress=False)
        except lf.errors.TrainingError as error:
            row["diverged"] = str(error)
        else:
            row["validation"] = lf.evaluate_loss(found.model, validation).mean
            row["curve"] = [
                ((record.step + 1) * batch * LENGTH, record.heldout)
                for record in found.history
                if record.heldout is not None
            ]
            row["released"] = next((r.step for r in found.history if r.released), None)
        print(f"{name}, rate {lr:g}, seed {seed}: {row['validation']:.3f}", flush=True)
        return row

    table = []
    for name in made:
        tried = [run(name, lr, seeds[0]) for lr in rates]
        lr = min(tried, key=lambda row: row["validation"])["lr"]
        table += [run(name, lr, seed) for seed in seeds]
    show(table, _loss(source, heldout))
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    print(f"{heldout.numel():,} held-out tokens; {len(seeds)} seeds; torch {torch.__version__}, "
          f"{base.precision}, {torch.get_num_threads()} threads of {cpu}")  # fmt: skip


def _loss(model: HookedTransformer, tokens: Tensor) -> float:
    return lf.evaluate_loss(model, tokens).mean


if __name__ == "__main__":
    tyro.cli(main)
