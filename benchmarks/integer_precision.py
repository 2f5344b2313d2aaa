"""Integers in place of floating point: products, fine-tuning, and what norms cost there.

    python benchmarks/integer_precision.py

Three tables. Errors of products of normal matrices by width. The bundled model, trained on Python
source, fine-tuned on the docstrings of torch, in float32 and in integers: the held-out loss in the
arithmetic of the training, and that of the finished float32 weights in float32. The live bundled
model and one without norms, made from it by the recipe distilled: loss and time of a forward pass
by arithmetic, taken in turns, both with TransformerLens' attention; and what an int8 pass does.
"""

import ast
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from seeds import spread
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers.utils import logging

import lnfree_interp as lf
from lnfree_interp.models.fixed_point import has_integer_kernel
from lnfree_interp.models.running import run
from lnfree_interp.removal.recipe import Recipe

WIDTHS = (16, 12, 10, 8)
LENGTH = 64
SEQUENCES = 250
"""Of the text that is held out."""
SHORTEST = 300
"""Characters; shorter docstrings are left out."""


def docstrings() -> list[str]:
    """Docstrings of torch's own modules, in a random order that is the same everywhere."""

    def written() -> Iterator[str]:
        for path in sorted(Path(torch.__file__).parent.rglob("*.py")):
            try:
                module = ast.parse(path.read_text(encoding="utf-8"))
            except SyntaxError:  # of a later Python
                continue
            for node in ast.walk(module):
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                text = ast.get_docstring(node) if isinstance(node, kinds) else None
                if text is not None and len(text) >= SHORTEST:
                    yield text

    found = sorted(set(written()))
    random.Random(0).shuffle(found)
    return found


def product_errors(seeds: int = 20) -> None:
    """Relative errors of products, by width."""
    print("| bits | largest entries 3.9 | as drawn |\n|---|---|---|")

    def error(bits: int, seed: int, largest: float) -> float:
        draw = torch.Generator().manual_seed(seed)
        x, W = (torch.randn(256, 256, generator=draw).clamp(-largest, largest) for _ in range(2))
        exact = x.double() @ W.double()
        found = (lf.fixed_point(x, bits) @ lf.fixed_point(W, bits)).double()
        return ((found - exact).norm() / exact.norm()).item()

    for bits in reversed(WIDTHS):
        below, drawn = (
            statistics.mean(error(bits, seed, largest) for seed in range(seeds))
            for largest in (3.9, 100.0)
        )
        print(f"| {bits} | {below:.1e} | {drawn:.1e} |")


def in_arithmetic(model: HookedTransformer, precision: str) -> AbstractContextManager[object]:
    """Floating point, or integers."""
    if precision == "float32":
        return nullcontext()
    return lf.integer_arithmetic(model, int(precision.removeprefix("int")))


def loss(model: HookedTransformer, tokens: Tensor, precision: str) -> float:
    """Cross-entropy in an arithmetic, nats per token."""
    with in_arithmetic(model, precision):
        return lf.evaluate_loss(model, tokens).mean


def best_rate(
    model: HookedTransformer,
    text: Tensor,
    validation: Tensor,
    recipe: Recipe,
    rates: Sequence[float],
) -> float:
    """The learning rate with the lowest loss, in float32."""

    def after(lr: float) -> float:
        tried = replace(recipe, lr=lr, precision="float32")
        done = lf.finetune(model, tried, text, progress=False, log_every=0)
        return lf.evaluate_loss(done.model, validation).mean

    return min(rates, key=after)


def finetuned(
    model: HookedTransformer, text: Tensor, heldout: Tensor, recipe: Recipe, seeds: int
) -> None:
    """Held-out losses after a fine-tuning, by precision."""
    before = lf.evaluate_loss(model, heldout).mean
    print("\n| precision | in that arithmetic | - float32 | weights in float32 | - float32 |")
    print("|" + "---|" * 5)
    print(f"| before | | | {before:.4f} | |")
    first: tuple[list[float], list[float]] | None = None
    for precision in ("float32", *(f"int{bits}" for bits in WIDTHS)):
        ours, exact = [], []
        for seed in range(seeds):
            recipe = replace(recipe, precision=precision, seed=seed)
            done = lf.finetune(model, recipe, text, progress=False, log_every=0)
            ours.append(loss(done.model, heldout, precision))
            exact.append(lf.evaluate_loss(done.model, heldout).mean)
        first = first or (ours, exact)
        cells = []
        for values, floats in zip((ours, exact), first, strict=True):
            apart = [x - y for x, y in zip(values, floats, strict=True)]
            cells += [spread(values, 4), spread(apart, 4, "+")]
        print(f"| {precision} | {' | '.join(cells)} |", flush=True)


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def forward_passes(model: HookedTransformer, removal_steps: int, rounds: int) -> None:
    """Loss and time of the live model and the LN-free one, by arithmetic."""
    train, python = (
        lf.pack(lf.stdlib_corpus(split), model.tokenizer, 128) for split in ("train", "heldout")
    )
    recipe = replace(lf.recipes.distilled(model, steps=removal_steps), precision="float32")
    free = lf.fold(lf.remove_norms(model, recipe, train, progress=False).model)
    live = lf.with_norm_sites(model)
    for layer in range(live.cfg.n_layers):  # a hook that looks at patterns: unfused, as in `free`
        live.add_hook(f"blocks.{layer}.attn.hook_pattern", lambda tensor, hook: None)
    tokens, python = python[:8], python[::9][:100]
    cases = [
        (name, one, precision)
        for precision in ("float32", *(f"int{bits}" for bits in WIDTHS))
        for name, one in (("live", live), ("LN-free", free))
    ]
    taken: dict[tuple[str, str], list[float]] = {(name, of): [] for name, _, of in cases}
    with torch.no_grad():
        for turn in range(rounds + 2):
            for name, one, precision in cases:
                with in_arithmetic(one, precision):
                    spent = seconds(lambda one=one: run(one, tokens))
                if turn >= 2:
                    taken[name, precision].append(spent)
    print(f"\n| arithmetic | model | held-out loss | - its float32 | ms for {tokens.numel():,} "
          "tokens | ratio to live |\n|" + "---|" * 6)  # fmt: skip
    exact: dict[str, float] = {}
    for name, one, precision in cases:
        found, spent = loss(one, python, precision), taken[name, precision]
        exact.setdefault(name, found)
        ratio = statistics.median(
            x / y for x, y in zip(spent, taken["live", precision], strict=True)
        )
        print(f"| {precision} | {name} | {found:.4f} | {found - exact[name]:+.4f} | "
              f"{1e3 * statistics.median(spent):.1f} | {ratio:.2f} |")  # fmt: skip
    counts = [lf.integer_operations(one, tokens).counts for one in (live, free)]
    print("\n| in a pass, per token | live | LN-free |\n|---|---|---|")
    for kind in counts[0]:
        each = " | ".join(f"{of[kind] / tokens.numel():,.0f}" for of in counts)
        print(f"| {kind} | {each} |")
    print(f"\n{rounds} rounds; removal in {removal_steps} steps; {python.numel():,} held-out "
          "tokens of Python")  # fmt: skip


def main(
    steps: int = 50,
    batch: int = 8,
    seeds: int = 3,
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3),
    removal_steps: int = 100,
    rounds: int = 9,
) -> None:
    """Run the benchmark.

    Args:
        steps: Steps of each fine-tuning.
        batch: Sequences of 64 tokens in a step.
        seeds: How many seeds: of the order of the text, and of rounding.
        rates: Peak learning rates; all precisions get the one with the lowest loss of float32 on
            other docstrings, with seed 0.
        removal_steps: Steps of the removal.
        rounds: How often each forward pass is timed, after two that do not count.
    """
    logging.disable_progress_bar()
    began = time.perf_counter()
    model = lf.load(lf.bundled_checkpoint(), device="cpu")
    product_errors()
    texts = docstrings()
    heldout, validation, train = (
        lf.pack(texts[begin:end], model.tokenizer, LENGTH)
        for begin, end in ((0, 400), (400, 800), (800, None))
    )
    # Some of each document.
    heldout, validation = (
        text[:: len(text) // SEQUENCES][:SEQUENCES] for text in (heldout, validation)
    )
    recipe = lf.recipes.finetuning(steps=steps, batch=batch)
    lr = best_rate(model, train, validation, recipe, rates)
    finetuned(model, train, heldout, replace(recipe, lr=lr), seeds)
    print(f"\n{steps} steps of {batch} x {LENGTH} tokens of {train.numel():,}, learning rate "
          f"{lr:g}; {seeds} seeds; {heldout.numel():,} held-out tokens of docstrings")  # fmt: skip
    forward_passes(model, removal_steps, rounds)
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    kernel = "int8 by torch._int_mm" if has_integer_kernel("cpu") else "int8 simulated"
    print(f"{kernel}; torch {torch.__version__}, {torch.get_num_threads()} threads of {cpu}; "
          f"{(time.perf_counter() - began) / 60:.0f} minutes")  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
