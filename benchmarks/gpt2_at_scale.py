"""GPT-2 small at full scale on one GPU: the published recipe, its control, and what came out.

    python benchmarks/gpt2_at_scale.py OUT [--model gpt2] [--data Skylion007/openwebtext]
    python benchmarks/gpt2_at_scale.py OUT --recipe gpt2-small --distillation 0.5
    python benchmarks/gpt2_at_scale.py OUT --tiny        # everything at toy size, on the CPU

Two runs of 157M tokens each, meant for one 80 GB GPU. The same command continues an interrupted
run. Model and data are names on the hub, or local: a folder that `save_pretrained` wrote, and
text, jsonl or parquet files. OUT gets `lnfree/` and `vanilla/`, which are runs that `lnfree remove
--resume` can continue, and `result.json`.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from transformer_lens import HookedTransformer

import lnfree_interp as lf
from lnfree_interp.data.names import STDLIB
from lnfree_interp.data.sources import open_sequences
from lnfree_interp.removal.job import RemovalJob
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run_job import make_recipe, resume_job, run_job
from lnfree_interp.removal.schedule import Sites, published_order


def shrunk(job: RemovalJob, model: Sites) -> Recipe:
    """The job's recipe in a few steps of a few sequences."""
    recipe = make_recipe(job, model)
    return replace(
        recipe,
        events=published_order(model, start=1, ln2_gap=1, qk_gap=1, v_gap=1)
        if recipe.events
        else (),
        steps=20,
        decay_steps=None,
        batch=4,
        micro_batch=2,
        warmup=2,
        evaluate_every=10,
        statistics=replace(recipe.statistics, sequences=4),
        special=type(recipe.special)(),
    )


def main(
    out: Annotated[Path, tyro.conf.Positional],
    /,
    model: str = "gpt2",
    data: str = "Skylion007/openwebtext",
    recipe: str = "gpt2-small",
    distillation: float | None = None,
    micro_batch: int = 32,
    heldout: int = 512,
    tiny: bool = False,
) -> None:
    """Run removal and control, one after the other.

    Args:
        out: Folder for both runs.
        model: Hub id or local folder.
        data: Hub id or local files.
        recipe: As `lnfree remove --recipe`.
        distillation: Replaces the recipe's.
        micro_batch: Sequences per forward pass; lower it on a smaller GPU.
        heldout: Sequences that are evaluated, while training and in the end, and not trained on.
        tiny: Use the bundled model, the standard library and a few steps.
    """
    job = RemovalJob(
        model=None if tiny else model,
        recipe=recipe,
        data=STDLIB if tiny else data,
        micro_batch=micro_batch,
        distillation=distillation,
        heldout=8 if tiny else heldout,
        sequence_length=64 if tiny else 1024,
        checkpoint_every=5 if tiny else 25,
    )
    result: dict[str, dict[str, float]] = {}
    out.mkdir(parents=True, exist_ok=True)
    for name in ("lnfree", "vanilla"):
        folder = out / name
        if (folder / "model").exists():
            print(f"{folder} is finished")
        elif folder.exists():
            resume_job(folder, say=print)
        else:
            run_job(
                replace(job, vanilla=name == "vanilla"),
                folder,
                recipe_of=shrunk if tiny else make_recipe,
                say=print,
            )
        result[name] = scores(lf.load(folder / "model"), job, job.heldout)
    original = lf.load(lf.bundled_checkpoint() if tiny else model)
    result["original"] = scores(original, job, job.heldout)
    for name, row in result.items():
        print(name, ", ".join(f"{what} {value:.4f}" for what, value in row.items()))
    gap = result["lnfree"]["mean"] - result["vanilla"]["mean"]
    print(f"LN-free minus vanilla: {gap:+.4f} nats per token on held-out text")
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    report = {"job": asdict(job), "hardware": hardware, **result}
    (out / "result.json").write_text(json.dumps(report, indent=1) + "\n")


def scores(model: HookedTransformer, job: RemovalJob, sequences: int) -> dict[str, float]:
    """Mean, median and 99.9th percentile of cross-entropy on held-out blocks."""
    split = "heldout" if job.text == STDLIB else job.split
    assert job.sequence_length is not None
    text = open_sequences(job.text, model.tokenizer, job.sequence_length, split=split).take(
        sequences
    )
    losses = lf.evaluate_loss(model, text, batch=4).per_token.numpy()
    median, p999 = np.quantile(losses, [0.5, 0.999]).tolist()
    mean, largest = float(losses.mean()), float(losses.max())
    return {"mean": mean, "median": median, "p99.9": p999, "largest": largest}


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
