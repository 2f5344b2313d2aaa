"""Banks of norms for several domains: what they forget, what selection by keys costs.

    python benchmarks/english_text.py text.jsonl
    HEADERS=$(python -c "import torch; print(torch.__path__[0])")/include/c10
    python benchmarks/norm_banks.py english=text.jsonl c++=$HEADERS

The bundled model learns one domain after the other: Python's standard library, then those that are
given, in their order. Each starts from the bank of the one before, so that with the last bank for
all these are also the runs of one model without banks, whose norms are fine-tuned on one domain
after the other. Joint training is one bank on the mixture, with as many steps as all domains have
together. The unembedding is trained for as many steps as one domain, after everything else. A
domain is a file of JSON lines with a field `text`, or a folder, whose headers (`.h`) are its
documents. Documents are shuffled; one in five is held out.
"""

import json
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from seeds import spread
from torch import Tensor
from transformer_lens import HookedTransformer
from tyro.conf import Positional

import lnfree_interp as lf

LENGTH = 128
PYTHON = "python"


def documents(path: Path) -> list[str]:
    """The documents of a domain, in a random order that is the same on every machine."""
    if path.is_dir():
        found = [file.read_text(encoding="utf-8", errors="ignore")
                 for file in sorted(path.rglob("*.h"))]  # fmt: skip
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line)["text"] for line in lines]
    random.Random(0).shuffle(found)
    return found[:2000]


def split(path: Path | None) -> tuple[list[str], list[str]]:
    """Documents to train on, and others that are held out; None for the standard library's."""
    if path is None:
        both = [lf.stdlib_corpus(split)["text"] for split in ("train", "heldout")]
        return list(both[0]), list(both[1])
    found = documents(path)
    held_out = len(found) // 5
    return found[held_out:], found[:held_out]


def packed(model: HookedTransformer, texts: Sequence[str], n: int) -> Tensor:
    """So many sequences, from all over the documents."""
    tokens = lf.pack(texts, model.tokenizer, LENGTH)
    if len(tokens) < n:
        raise SystemExit(f"{len(tokens)} sequences of {LENGTH} tokens, {n} are needed: give more")
    return tokens[:: len(tokens) // n][:n]


def joint(
    banks: lf.NormBanks, texts: dict[str, Tensor], recipe: lf.Recipe, heldout: dict[str, Tensor]
) -> lf.BankEvaluation:
    """One bank on the mixture of all, evaluated on each domain."""
    mixture = replace(recipe, steps=recipe.steps * len(texts))
    tokens = torch.cat(list(texts.values()))
    model = banks.train("joint", tokens, mixture, progress=False, log_every=0).model
    loss = [lf.evaluate_loss(model, tokens).mean for tokens in heldout.values()]
    right = [share_right(model, tokens) for tokens in heldout.values()]
    table = torch.tensor([loss]).double(), torch.tensor([right]).double()
    return lf.BankEvaluation(tuple(texts), ("joint",), "joint", *table)


@torch.no_grad()
def share_right(model: HookedTransformer, tokens: Tensor) -> float:
    """The share of tokens that are the most likely one."""
    found = [model(rows)[:, :-1].argmax(-1) == rows[:, 1:] for rows in tokens.split(16)]
    return torch.cat(found).double().mean().item()


def one_seed(
    model: HookedTransformer, train: dict[str, Tensor], heldout: dict[str, Tensor],
    recipe: lf.Recipe, head_lr: float,
) -> dict[str, lf.BankEvaluation]:  # fmt: skip
    """All rows of the table."""
    banks = lf.NormBanks.of(model)
    for domain, tokens in train.items():
        banks.train(domain, tokens, recipe, progress=False, log_every=0)
    banks.fit_keys(train)
    rows = {
        "one set of norms, one domain after the other": banks.evaluate(heldout, selection="last"),
        "one set of norms, all domains mixed": joint(
            lf.NormBanks.of(model), train, recipe, heldout
        ),
        "banks, domain given": banks.evaluate(heldout),
        "banks, by keys": banks.evaluate(heldout, selection="keys"),
    }
    banks.train_head(train, replace(recipe, lr=head_lr), progress=False)
    rows["banks and unembedding, domain given"] = banks.evaluate(heldout)
    rows["banks and unembedding, by keys"] = banks.evaluate(heldout, selection="keys")
    return rows


def show(found: list[dict[str, lf.BankEvaluation]]) -> None:
    """The tables, with means over seeds."""
    names = found[0]["banks, by keys"].domains
    before = found[0]["banks, by keys"].before
    assert before is not None
    print(f"\n| norms | {' | '.join(names)} | mean loss | forgetting | accuracy | forgotten |")
    print("|" + "---|" * (5 + len(names)))
    cells = [f"{loss:.3f}" for loss in [*before.tolist(), before.mean().item()]]
    print(f"| before | {' | '.join(cells)} | | | |")
    for row in found[0]:
        every = [one[row] for one in found]
        only_one = len(every[0].stages) == 1
        cells = [
            *(spread([one.loss[-1, i].item() for one in every]) for i in range(len(names))),
            spread([one.loss[-1].mean().item() for one in every]),
            "" if only_one else spread([one.forgetting for one in every]),
            spread([100 * one.accuracy[-1].mean().item() for one in every], 1) + " %",
            "" if only_one else spread([100 * one.forgotten_accuracy for one in every], 1) + " %",
        ]
        print(f"| {row} | {' | '.join(cells)} |")
    print("\nLosses after each domain, in nats per token, means over seeds")
    for row in found[0]:
        tables = torch.stack([one[row].loss for one in found]).mean(0)
        if len(tables) > 1:
            print(f"\n{row}\n| after | {' | '.join(names)} |\n|" + "---|" * (1 + len(names)))
            for stage, losses in zip(names, tables.tolist(), strict=True):
                print(f"| {stage} | {' | '.join(f'{loss:.3f}' for loss in losses)} |")
    selected = found[0]["banks, by keys"].selected
    assert selected is not None
    print(f"\nSelected by keys, sequences\n| of | {' | '.join(names)} |\n|" + "---|" *
          (1 + len(names)))  # fmt: skip
    for domain, counts in zip(names, selected.tolist(), strict=True):
        print(f"| {domain} | {' | '.join(map(str, counts))} |")
    print(f"\n{found[0]['banks, by keys'].selection_accuracy:.1%} got the bank of their domain")


def main(
    domains: Positional[tuple[str, ...]],
    steps: int = 30,
    batch: int = 8,
    lr: float = 1e-2,
    head_lr: float = 1e-4,
    sequences: int = 240,
    heldout: int = 60,
    seeds: tuple[int, ...] = (0, 1, 2),
    picture: Path | None = None,
) -> None:
    """Run the benchmark.

    Args:
        domains: `NAME=PATH` of each domain but Python, in the order of training.
        steps: Steps on each domain.
        batch: Sequences of 128 tokens in a step.
        lr: The peak learning rate of norms.
        head_lr: That of the unembedding.
        sequences: Sequences of a domain to train on, and for its key.
        heldout: Sequences of a domain to evaluate on.
        seeds: Seeds of the order of the text.
        picture: Where to draw the losses of the first seed, `.png`, `.svg` or `.html`.
    """
    began = time.perf_counter()
    model = lf.load(lf.bundled_checkpoint(), device="cpu")
    paths: dict[str, Path | None] = {PYTHON: None}
    for given in domains:
        name, _, path = given.partition("=")
        paths[name] = Path(path)
    both = {name: split(path) for name, path in paths.items()}
    train = {name: packed(model, texts[0], sequences) for name, texts in both.items()}
    held = {name: packed(model, texts[1], heldout) for name, texts in both.items()}
    recipe = replace(lf.recipes.finetuning(steps=steps, batch=batch), precision="float32", lr=lr)
    found = []
    for seed in seeds:
        found.append(one_seed(model, train, held, replace(recipe, seed=seed), head_lr))
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    show(found)
    if picture is not None:
        names = ("one set of norms, one domain after the other", "banks, by keys")
        shown = {name: found[0][name] for name in names}
        lf.plots.save(lf.plots.norm_banks(shown), picture)
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    print(f"\n{steps} steps of {batch} sequences of {LENGTH} tokens for each domain, from "
          f"{sequences}; {heldout * LENGTH:,} held-out tokens of each; rates {lr:g} and "
          f"{head_lr:g}; seeds {', '.join(map(str, seeds))}; torch {torch.__version__}, float32, "
          f"{torch.get_num_threads()} threads of {cpu}; {time.perf_counter() - began:.0f} "
          "seconds")  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
