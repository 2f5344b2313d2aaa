"""What removal costs per token, by recipe: LN-free minus vanilla on the bundled model.

    python benchmarks/removal_quality.py [--seeds 0 1 2] [--jobs 2] [--json FILE]

Every recipe runs for as many tokens as its control, `recipe.vanilla()`: same text in the same
order at the same learning rates, nothing removed. The long runs read `--sequences` sequences of 256
tokens, the short ones a third of them. Loss on text that neither training nor pretraining saw, in
nats per token; the largest residual norm is over all layers and all positions but the first.
"""

import json
import platform
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers.utils import logging

import lnfree_interp as lf
from lnfree_interp.errors import TrainingError
from lnfree_interp.removal.probes import ResidualProbe
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.recipes import at_once, distilled, published_style, tapered
from lnfree_interp.removal.schedule import Sites

Make = Callable[[Sites, int, int], Recipe]


def plain(recipe: Callable[..., Recipe], batch: int = 16, **changes: float) -> Make:
    """A recipe with some settings changed."""

    def make(model: Sites, sequences: int, seed: int) -> Recipe:
        made = recipe(model, steps=sequences // batch, seed=seed)
        return replace(made, batch=batch, **changes)

    return make


# (name, distillation, auxiliary loss) -> recipe
VARIANTS: dict[tuple[str, str, str], Make] = {
    ("published style", "-", "batch"): plain(published_style),
    ("published style", "-", "-"): plain(published_style, scale_anchor=0.0),
    ("published style", "0.5", "batch"): plain(published_style, distillation=0.5),
    ("published style", "1", "batch"): plain(published_style, distillation=1.0),
    ("published style, half the batch", "-", "batch"): plain(published_style, 8),
    ("distilled", "1", "batch"): plain(distilled, 8),
    ("taper", "-", "frozen"): plain(tapered),
    ("taper", "1", "frozen"): plain(tapered, distillation=1.0),
    ("all at once", "-", "batch"): plain(at_once, distillation=0.0),
    ("all at once", "1", "batch"): plain(at_once),
}
LONG = (
    ("published style", "-", "batch"),
    ("published style, half the batch", "-", "batch"),
    ("distilled", "1", "batch"),
)


@dataclass(frozen=True)
class Task:
    """One run."""

    variant: tuple[str, str, str]
    vanilla: bool
    sequences: int
    seed: int


@dataclass(frozen=True)
class Result:
    """What came out of it."""

    task: Task
    tokens: int
    mean: float
    median: float
    p999: float
    largest_norm: float
    seconds: float
    diverged: str | None = None


@cache
def material(stride: int) -> tuple[HookedTransformer, dict[str, Tensor]]:
    """The bundled model, its training text, and every `stride`-th held-out sequence."""
    logging.disable_progress_bar()
    model = lf.load(lf.bundled_checkpoint(), device="cpu")
    text = {
        split: lf.pack(lf.stdlib_corpus(split), model.tokenizer, model.cfg.n_ctx)
        for split in ("train", "heldout")
    }
    return model, text | {"heldout": text["heldout"][::stride]}


@torch.no_grad()
def quality(model: HookedTransformer, text: Tensor) -> tuple[float, float, float, float]:
    """Mean, median, 99.9th percentile of cross-entropy, and the largest residual norm."""
    losses = lf.evaluate_loss(model, text).per_token.numpy()
    median, p999 = np.quantile(losses, [0.5, 0.999]).tolist()
    probe = ResidualProbe(model)
    with model.hooks(probe.hooks):
        for tokens in text.split(16):
            model(tokens, return_type=None)
    return float(losses.mean()), median, p999, max(probe.read()["resid_norm_max"])


def run(task: Task, stride: int, threads: int) -> Result:
    """Train and evaluate."""
    torch.set_num_threads(threads)
    model, text = material(stride)
    recipe = VARIANTS[task.variant](model, task.sequences, task.seed)
    recipe = recipe.vanilla() if task.vanilla else recipe
    tokens = recipe.steps * recipe.batch * text["train"].shape[1]
    try:
        done = lf.remove_norms(model, recipe, text["train"], progress=False, log_every=0)
    except TrainingError as error:
        nan = float("nan")
        return Result(task, tokens, nan, nan, nan, nan, nan, str(error))
    finished = done.model if task.vanilla else lf.fold(done.model)
    return Result(task, tokens, *quality(finished, text["heldout"]), done.seconds)


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    sequences: int = 1920,
    stride: int = 3,
    jobs: int = 1,
    out: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Run the benchmark.

    Args:
        seeds: Random seeds of the order of the text.
        sequences: Sequences of text in the long runs; the short ones have a third.
        stride: Evaluate on every `stride`-th held-out sequence.
        jobs: Runs at a time.
        out: Also write all results there, as they come.
    """
    short = sequences // 3
    runs = [(variant, sequences) for variant in LONG] + [(variant, short) for variant in VARIANTS]
    # Controls differ by their learning rates: one for each schedule of rates, not for each variant.
    controls = {_rates(variant): variant for variant in VARIANTS}
    wanted = dict.fromkeys((controls[_rates(variant)], length) for variant, length in runs)
    tasks = [
        Task(variant, vanilla, length, seed)
        for seed in seeds
        for vanilla, chosen in ((False, runs), (True, wanted))
        for variant, length in chosen
    ]
    threads = max(1, torch.get_num_threads() // jobs)
    model, text = material(stride)
    mean, median, p999, largest = quality(model, text["heldout"])
    print(f"original: mean {mean:.4f}, median {median:.4f}, p99.9 {p999:.3f}, norm {largest:.0f}")
    results: dict[Task, Result] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = [pool.submit(run, task, stride, threads) for task in tasks]
        for future in futures:
            result = future.result()
            results[result.task] = result
            print(f"# {result.task} {result.mean:.4f} {result.seconds:.0f} s", flush=True)
            if out is not None:
                out.write_text(json.dumps([asdict(r) for r in results.values()], indent=1) + "\n")
    table(results, runs, controls, seeds)
    print(
        f"{text['heldout'].numel():,} held-out tokens; seeds {seeds}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, {jobs} x {threads} threads of "
        f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}"
    )


def _rates(variant: tuple[str, str, str]) -> str:
    """Whose learning rates and batch: those of taper and all at once are the published style's."""
    name = variant[0]
    return "published style" if name in ("taper", "all at once") else name


def table(
    results: dict[Task, Result],
    runs: list[tuple[tuple[str, str, str], int]],
    controls: dict[str, tuple[str, str, str]],
    seeds: Iterable[int],
) -> None:
    """Means over seeds; of gaps, with their standard deviation."""
    print(
        "| recipe | KL | auxiliary | tokens | LN-free | gap of means | of medians | of p99.9 | "
        "largest norm |\n|---|---|---|---|---|---|---|---|---|"
    )
    for variant, length in runs:
        ours = [results[Task(variant, False, length, seed)] for seed in seeds]
        control = controls[_rates(variant)]
        theirs = [results[Task(control, True, length, seed)] for seed in seeds]
        diverged = sum(r.diverged is not None for r in ours)
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.diverged is None]
        name = " | ".join(variant)
        if not pairs:
            print(f"| {name} | {ours[0].tokens:,} | diverged in all of {len(ours)} runs | | | | |")
            continue
        gaps = {
            field: [getattr(a, field) - getattr(b, field) for a, b in pairs]
            for field in ("mean", "median", "p999")
        }
        spread = statistics.stdev(gaps["mean"]) if len(pairs) > 1 else float("nan")
        note = f" ({diverged} diverged)" if diverged else ""
        print(
            f"| {name} | {ours[0].tokens:,} "
            f"| {statistics.mean(a.mean for a, _ in pairs):.4f}{note} "
            f"| {statistics.mean(gaps['mean']):+.4f} ± {spread:.4f} "
            f"| {statistics.mean(gaps['median']):+.4f} | {statistics.mean(gaps['p999']):+.3f} "
            f"| {max(a.largest_norm for a, _ in pairs):.0f} |"
        )
    for rates, control in controls.items():
        for length in sorted({n for v, n in runs if _rates(v) == rates}, reverse=True):
            found = [results[Task(control, True, length, seed)] for seed in seeds]
            print(
                f"vanilla, rates of {rates}, {found[0].tokens:,} tokens: "
                f"mean {statistics.mean(r.mean for r in found):.4f}, "
                f"median {statistics.mean(r.median for r in found):.4f}, "
                f"p99.9 {statistics.mean(r.p999 for r in found):.3f}, "
                f"largest norm {max(r.largest_norm for r in found):.0f}"
            )


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
