"""Does attribution predict what deletions change? One table, norms live and frozen.

    python benchmarks/english_text.py text.jsonl
    python benchmarks/deletions.py text.jsonl

SmolLM2 (`make smollm2`) on prompts about an indirect object: as it is, and with the norms frozen
that these questions read through, without training, on that text. Then the bundled model and the
LN-free one that `make demo` made of it, on held-out source code.
"""

import json
import platform
import sys
import time
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
import tyro
from transformer_lens import HookedTransformer
from tyro.conf import Positional

import lnfree_interp as lf

LENGTH = 256
DOCUMENTS = 40
"""The first of the text; they are in a random order."""
SEQUENCES = 40
"""Of text: 32 to measure constants on, the rest for the price."""
KS = (1, 2, 4, 8)


def draw_heads(model: HookedTransformer, layers: range, each: int, seed: int) -> list[str]:
    """So many heads of each layer."""
    generator = torch.Generator().manual_seed(seed)
    return [
        f"L{layer}H{head}"
        for layer in layers
        for head in torch.randperm(model.cfg.n_heads, generator=generator)[:each].tolist()
    ]


def show(name: str, check: lf.DeletionCheck) -> None:
    """The rows of one model; slope, NMAE and sign are those of the components of largest share."""
    at_k = check.summary().set_index(["kind", "chosen", "k"])
    pooled = check.summary(["kind", "chosen"]).set_index(["kind", "chosen"])
    for kind in pooled.index.unique("kind"):
        top = pooled.loc[(kind, "top")]
        ks: pd.DataFrame = at_k.loc[(kind, "top")]
        cells = [f"{ks.loc[k, 'correlation']:.3f}" for k in KS]
        cells += [f"{pooled.loc[(kind, 'random'), 'correlation']:.3f}", f"{top['slope']:.2f}"]
        cells += [f"{top['nmae']:.2g}", f"{top['sign']:.1%}"]
        n = int(ks["n"].iloc[0])
        print(f"| {name} | {kind} | {n} | {' | '.join(cells)} |", flush=True)


def say(line: str) -> None:
    """Progress, apart from the table."""
    print(line, file=sys.stderr, flush=True)


def smollm2(text: Path, prompts: int, first_layer: int, seed: int) -> list[str]:
    """The rows of SmolLM2; what to say about them."""
    model = lf.load(lf.smollm2())
    clean, _, answers, foils = lf.ioi_pairs(model, prompts, seed=seed)
    late = range(first_layer, model.cfg.n_layers)
    heads, early = (draw_heads(model, x, 1, seed) for x in (late, range(1, first_layer)))
    with text.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in islice(lines, DOCUMENTS)]
    tokens = lf.pack(documents, model.tokenizer, LENGTH)[:SEQUENCES]
    sites = [*(f"blocks.{layer}.ln1.qk" for layer in late), "ln_final"]
    frozen = lf.freeze_for(model, sites, tokens[:32], heldout=tokens[32:], progress=False)
    say(repr(frozen))
    for name, one, asked in (
        ("SmolLM2, early layers, as it is", model, early),
        ("SmolLM2, as it is", model, heads),
        ("SmolLM2, frozen", frozen.model, heads),
    ):
        began = time.monotonic()
        check = lf.deletion_check(
            one, clean, asked, k=KS, seed=seed, answers=answers, foils=foils, progress=False
        )
        say(f"{check!r}, {time.monotonic() - began:.0f} s")
        show(name, check)
    return [
        f"SmolLM2: {len(clean)} prompts of {clean.shape[1]} tokens x {len(heads)} heads, one of "
        f"each layer from {first_layer} ({len(early)} heads before it); "
        f"frozen: {len(sites)} norms, {frozen.price}"
    ]


def bundled(free: Path, prompts: int, seed: int) -> list[str]:
    """The rows of the bundled model; what to say about them."""
    model = lf.load(lf.bundled_checkpoint())
    tokens = lf.pack(lf.stdlib_corpus("heldout"), model.tokenizer, LENGTH)
    clean, _, answers = lf.corrupted_pairs(tokens, n=prompts, length=16, seed=seed)
    heads = draw_heads(model, range(1, model.cfg.n_layers), model.cfg.n_heads, seed)
    for name, one in (("bundled, as it is", model), ("bundled, LN-free", lf.load(free))):
        check = lf.deletion_check(
            one, clean, heads, k=KS, seed=seed, answers=answers, progress=False
        )
        say(repr(check))
        show(name, check)
    return [
        f"bundled: {len(clean)} prompts of {clean.shape[1]} tokens x {len(heads)} heads, all but "
        "the first layer's"
    ]


def main(
    text: Positional[Path],
    free: Path = Path("lnfree-demo/model"),
    prompts: int = 24,
    first_layer: int = 12,
    seed: int = 0,
) -> None:
    """Run the benchmark.

    Args:
        text: One JSON object with a field `text` on each line, of English.
        free: The LN-free model that was made of the bundled one.
        prompts: Prompts of each model.
        first_layer: The first layer of SmolLM2 whose norms are frozen; before it they cost most.
        seed: Of prompts, heads and random components.
    """
    began = time.monotonic()
    head = [f"k = {k}" for k in KS]
    print(f"| model | what changes | n | {' | '.join(head)} | random | slope | NMAE | sign |")
    print("|" + "---|" * (7 + len(KS)), flush=True)
    notes = smollm2(text, prompts, first_layer, seed) + bundled(free, prompts, seed)
    print("\n" + "; ".join(notes))
    print(
        f"seed {seed}; float32; torch {torch.__version__}, {torch.get_num_threads()} threads of "
        f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}; "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    tyro.cli(main)
