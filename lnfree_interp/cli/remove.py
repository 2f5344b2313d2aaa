"""`lnfree remove`."""

import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lnfree_interp.cli.terminal import quiet_libraries, say


def remove(
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None,
    /,
    out: Path = Path("lnfree-run"),
    recipe: str = "distilled",
    data: str = "stdlib",
    plan: bool = False,
    resume: Path | None = None,
    steps: int | None = None,
    batch: int | None = None,
    micro_batch: int | None = None,
    lr: float | None = None,
    distillation: float | None = None,
    scale_anchor: float | None = None,
    precision: Literal["auto", "bfloat16", "float32"] | None = None,
    patience: int | None = None,
    evaluate_every: int | None = None,
    seed: int | None = None,
    vanilla: bool = False,
    rollback: bool = False,
    sequence_length: int | None = None,
    heldout: int = 64,
    split: str = "train",
    data_name: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    data_revision: str | None = None,
    checkpoint_every: int = 50,
    track: tuple[Literal["tensorboard", "wandb"], ...] = (),
) -> None:
    """Remove a model's norms by fine-tuning it, on your own text.

    Writes OUT with run.json, metrics.jsonl, checkpoints/ and, in the end, model/. A run that was
    cut off goes on with `lnfree remove --resume OUT`. With several processes:
    `accelerate launch -m lnfree_interp remove ...`.

    Args:
        model: Hub id or local Hugging Face folder. Default: the small GPT-2 that ships with the
            package.
        out: Folder to write; must not hold anything yet.
        recipe: distilled, published-style, taper, at-once; for GPT-2 itself gpt2-small,
            gpt2-medium, gpt2-large, gpt2-xl, gpt2-small-2024.
        data: stdlib; a .txt, .jsonl, .json, .parquet, .arrow or .csv file, a folder or pattern of
            them, or what save_to_disk wrote; else a data set on the hub, streamed.
        plan: Say what would be done; do nothing.
        resume: Go on with the run in this folder. Everything else comes from there.
        steps: Optimiser steps. This and the following settings replace the recipe's.
        batch: Sequences of text per step, over all processes.
        micro_batch: Sequences per forward pass and process.
        lr: Peak learning rate.
        distillation: Share of the loss that is the KL divergence from the original.
        scale_anchor: Weight of the auxiliary loss on ln_final's input.
        precision: Of matrix products; auto takes bfloat16 where the hardware has it.
        patience: Stop after so many evaluations without a new minimum.
        evaluate_every: Steps between two evaluations.
        seed: Of the order of the text.
        vanilla: The control: same steps, text and rates; the norms stay.
        rollback: If the run diverges, go back to the last checkpoint with wider gaps.
        sequence_length: Tokens per sequence. Default: the recipe's, or the model's context up to 1024.
        heldout: Sequences of text to evaluate on, 0 for none: of stdlib's held-out modules, else the
            first ones, which the first epoch leaves out.
        split: Of the data set.
        data_name: Configuration of a data set on the hub.
        column: Column with the text, or with token ids.
        revision: Of the model on the hub.
        data_revision: Of the data set on the hub.
        checkpoint_every: Steps between two checkpoints.
        track: Also log to tensorboard or wandb.
    """
    from lnfree_interp.files import require_writable

    if resume is None and not plan:
        require_writable(out)
    say("importing torch, transformers and transformer_lens ...")
    quiet_libraries()
    from lnfree_interp.removal import job as jobs

    progress = os.environ.get("RANK", "0") == "0"
    if resume is not None:
        out = resume
        run = jobs.resume_job(resume, progress=progress, say=say)
    else:
        job = jobs.Job(
            model=model,
            revision=revision,
            text=data,
            split=split,
            name=data_name,
            column=column,
            text_revision=data_revision,
            sequence_length=sequence_length,
            heldout=heldout,
            checkpoint_every=checkpoint_every,
            trackers=track,
        )
        changes = {
            "batch": batch,
            "micro_batch": micro_batch,
            "lr": lr,
            "distillation": distillation,
            "scale_anchor": scale_anchor,
            "precision": precision,
            "patience": patience,
            "evaluate_every": evaluate_every,
            "seed": seed,
            "rollback": rollback,
        }
        run = jobs.run_job(
            job,
            out,
            lambda loaded: jobs.make_recipe(
                recipe, loaded, steps=steps, vanilla=vanilla, **changes
            ),
            only_plan=plan,
            progress=progress,
            say=say,
        )
    if run is None:
        say("nothing was trained")
        return
    last = run.history[-1]
    say(f"{len(run.history)} steps; loss of the last batch {last.loss:.4f} nats per token")
    if heldouts := [record.heldout for record in run.history if record.heldout is not None]:
        say(f"held-out cross-entropy {heldouts[-1]:.4f} nats per token at the last evaluation")
    say(f"wrote {out}/model, metrics.jsonl and checkpoints/")
