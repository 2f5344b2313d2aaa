"""What a fine-tuning needs to train: all parameters, norms, biases, parts of the norms, or LoRA.

    python benchmarks/english_text.py text.jsonl
    pip install peft
    python benchmarks/trainable.py text.jsonl rows.jsonl

The bundled model, trained on Python source, is fine-tuned on English with equal tokens. Each choice
of parameters has its own best learning rate: the one of `--rates` with the lowest loss on English
that is neither trained nor held out, with the first seed. LoRA is peft's, on the model in
`transformers`, with the same text, order, schedule and AdamW. Finished runs are lines of
`rows.jsonl` and are not repeated. Fisher information is the empirical one, of 32 sequences of the
training text.
"""

import importlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
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
from lnfree_interp.data.sequences import ShuffledSequences
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.removal.optimizer import adamw
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import cosine_with_warmup

LENGTH = 128
LORA = "LoRA, rank 4"


def english(file: Path, model: HookedTransformer, documents: slice) -> Tensor:
    """Packed text of some of the documents."""
    lines = file.read_text(encoding="utf-8").splitlines()[documents]
    return lf.pack([json.loads(line)["text"] for line in lines], model.tokenizer, LENGTH)


def choices(
    model: HookedTransformer, text: Tensor
) -> dict[str, Callable[[int], str | lf.ParameterMask]]:
    """What is trained, by name and seed."""
    fisher = lf.fisher_information(model, text[:32], trainable="norms", progress=False)
    norms = lf.select_parameters(model, "norms")
    return {
        "all parameters": lambda _: "all",
        "biases": lambda _: "biases",
        "norms": lambda _: "norms",
        "20 % of the norms, most Fisher information": lambda _: lf.fisher_subset(fisher, 0.2),
        "20 % of the norms, at random": lambda seed: lf.random_subset(norms, 0.2, seed=seed),
    }


def trained(
    model: HookedTransformer, recipe: Recipe, text: Tensor
) -> tuple[HookedTransformer, dict[str, float]]:
    """The model, trained by the engine, and what that took."""
    sited = lf.with_norm_sites(model)
    optimizer = adamw(sited, recipe)
    sited(text[:1], return_type="loss").backward()
    optimizer.select()
    optimizer.step()
    state = sum(x.nbytes for one in optimizer.state.values() for x in one.values() if x.dim())
    entries = sum(W.numel() for W in optimizer.moved(sited).values())
    run = lf.finetune(model, recipe, text, progress=False, log_every=0)
    seconds = statistics.median(record.seconds for record in run.history)
    return run.model, {"entries": entries, "optimizer": state, "seconds": seconds}


def with_lora(
    model: HookedTransformer, recipe: Recipe, text: Tensor
) -> tuple[HookedTransformer, dict[str, float]]:
    """The same by peft, on the model in transformers."""
    peft = importlib.import_module("peft")
    torch.manual_seed(recipe.seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    wrapped = peft.get_peft_model(lf.formats.to_transformers(model), config).train()
    weights = [W for W in wrapped.parameters() if W.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    data, taken = ShuffledSequences(text, seed=recipe.seed), []
    for step in range(recipe.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * cosine_with_warmup(
                step, steps=recipe.steps, warmup=recipe.warmup, floor=recipe.final_lr
            )
        batch = data.take(recipe.batch)
        for tokens in batch.split(recipe.micro_batch):
            loss = next_token_loss(wrapped(tokens).logits, tokens)
            (loss * len(tokens) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - began)
    state = sum(x.nbytes for one in optimizer.state.values() for x in one.values() if x.dim())
    merged = lf.load(wrapped.merge_and_unload().eval(), tokenizer=model.tokenizer, device="cpu")
    return merged, {
        "entries": sum(W.numel() for W in weights), "optimizer": state,
        "seconds": statistics.median(taken),
    }  # fmt: skip


def show(rows: Sequence[dict[str, Any]], before: dict[str, float]) -> None:
    """The table."""
    print("\n| trained | numbers | rate | English, held out | Python, held out | AdamW's memory | "
          "seconds a step |")  # fmt: skip
    print("|" + "---|" * 7)
    print(f"| nothing | 0 | | {before['english']:.3f} | {before['python']:.3f} | | |")
    for name in dict.fromkeys(row["name"] for row in rows):
        of = [row for row in rows if row["name"] == name]
        cells = [
            f"{of[0]['entries']:,}", f"{of[0]['lr']:g}",
            *(spread([row[text] for row in of]) for text in ("english", "python")),
            f"{of[0]['optimizer'] / 1e3:,.0f} kB",
            f"{statistics.median(row['seconds'] for row in of):.3f}",
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")


def main(
    text: Positional[Path],
    rows: Positional[Path],
    steps: int = 100,
    batch: int = 8,
    seeds: tuple[int, ...] = (0, 1, 2),
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2),
) -> None:
    """Run the benchmark.

    Args:
        text: What `english_text.py` wrote.
        rows: The file of finished runs; it is made if it does not exist.
        steps: Steps of each run.
        batch: Sequences of 128 tokens in a step.
        seeds: Seeds of the order of the text, and of what is drawn.
        rates: Peak learning rates, of which each choice of parameters gets its best.
    """
    logging.disable_progress_bar()
    model = lf.load(lf.bundled_checkpoint(), device="cpu")
    train = english(text, model, slice(1000))
    validation, heldout = (
        english(text, model, slice(begin, begin + 100))[::7][:100] for begin in (5000, 5300)
    )
    python = lf.pack(lf.stdlib_corpus("heldout"), model.tokenizer, LENGTH)[::9][:100]
    base = replace(lf.recipes.finetuning(steps=steps, batch=batch), precision="float32")
    made = choices(model, train)
    done = Rows(rows)

    def run(name: str, lr: float, seed: int) -> dict[str, Any]:
        about = {"name": name, "lr": lr, "seed": seed, "steps": steps, "batch": batch}
        return done.get(about, lambda: anew(name, lr, seed))

    def anew(name: str, lr: float, seed: int) -> dict[str, Any]:
        recipe = replace(base, lr=lr, seed=seed)
        row: dict[str, Any] = dict.fromkeys(("validation", "english", "python"), math.inf)
        try:
            if name == LORA:
                after, found = with_lora(model, recipe, train)
            else:
                recipe = replace(recipe, trainable=made[name](seed))
                after, found = trained(model, recipe, train)
            texts = {"validation": validation, "english": heldout, "python": python}
            row |= found | {n: lf.evaluate_loss(after, x).mean for n, x in texts.items()}
        except lf.errors.TrainingError as error:
            row["diverged"] = str(error)
        print(f"{name}, rate {lr:g}, seed {seed}: {row['english']:.3f}", flush=True)
        return row

    table = []
    for name in (*made, LORA):
        tried = [run(name, lr, seeds[0]) for lr in rates]
        lr = min(tried, key=lambda row: row["validation"])["lr"]
        table += [run(name, lr, seed) for seed in seeds]
    texts = {"english": heldout, "python": python}
    show(table, {name: lf.evaluate_loss(model, x).mean for name, x in texts.items()})
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    print(f"\n{steps * batch * LENGTH:,} tokens of English; {heldout.numel():,} held-out tokens of "
          f"it, {python.numel():,} of Python; {len(seeds)} seeds; torch {torch.__version__}, "
          f"float32, {torch.get_num_threads()} threads of {cpu}")  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
