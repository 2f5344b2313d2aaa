"""The command line: `lnfree demo`, `remove`, `convert`, `evaluate`, `report`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lnfree_interp.errors import DataError, LnfreeError


def demo(
    checkpoint: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CHECKPOINT]")
    ] = None,
    /,
    out: Path = Path("lnfree-demo"),
    steps: int = 250,
    seed: int = 0,
) -> None:
    """Remove every LayerNorm from a pretrained model and show what that buys.

    Loads a checkpoint, removes its norms by a short fine-tuning on the source of Python's standard
    library (and runs the control that keeps them), folds, evaluates, attributes logits, and writes
    OUT with model/, metrics.json and report.html. About five minutes on two CPU cores.

    Args:
        checkpoint: Hub id or local Hugging Face folder. Default: the small GPT-2 that ships with
            the package.
        out: Folder to write; must not hold anything yet.
        steps: Optimiser steps, for the removal and again for its control.
        seed: Of the order of the training text.
    """
    from lnfree_interp.files import require_writable

    require_writable(out)
    print("importing torch, transformers and transformer_lens ...", flush=True)
    _quiet_libraries()
    from lnfree_interp.demo import run_demo

    result = run_demo(out, checkpoint, steps=steps, seed=seed, say=_say)
    for table in result.tables().values():
        print(f"\n{table.to_text()}")
    print(f"\nLN-free minus vanilla on held-out text: {result.gap:+.4f} nats per token")
    print(f"took {result.seconds / 60:.1f} minutes; wrote")
    for name in ("report.html", "metrics.json", "model/"):
        print(f"  {out / name}")


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
    block: int | None = None,
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
        batch: Blocks of text per step, over all processes.
        micro_batch: Blocks per forward pass and process.
        lr: Peak learning rate.
        distillation: Share of the loss that is the KL divergence from the original.
        scale_anchor: Weight of the auxiliary loss on ln_final's input.
        precision: Of matrix products; auto takes bfloat16 where the hardware has it.
        patience: Stop after so many evaluations without a new minimum.
        evaluate_every: Steps between two evaluations.
        seed: Of the order of the text.
        vanilla: The control: same steps, text and rates; the norms stay.
        rollback: If the run diverges, go back to the last checkpoint with wider gaps.
        block: Tokens per block. Default: the recipe's, or the model's context up to 1024.
        heldout: Blocks of text to evaluate on, 0 for none: of stdlib's held-out modules, else the
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
    _say("importing torch, transformers and transformer_lens ...")
    _quiet_libraries()
    from lnfree_interp.removal import job as jobs

    progress = os.environ.get("RANK", "0") == "0"
    if resume is not None:
        out = resume
        run = jobs.resume_job(resume, progress=progress, say=_say)
    else:
        job = jobs.Job(
            model=model,
            revision=revision,
            text=data,
            split=split,
            name=data_name,
            column=column,
            text_revision=data_revision,
            block=block,
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
            say=_say,
        )
    if run is None:
        _say("nothing was trained")
        return
    last = run.history[-1]
    _say(f"{len(run.history)} steps; loss of the last batch {last.loss:.4f} nats per token")
    if heldouts := [record.heldout for record in run.history if record.heldout is not None]:
        _say(f"held-out cross-entropy {heldouts[-1]:.4f} nats per token at the last evaluation")
    _say(f"wrote {out}/model, metrics.jsonl and checkpoints/")


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    form: Literal["folded", "frozen"] | None = None,
    to_norm: Literal["rms", "crms"] | None = None,
    basis: Literal["orthonormal", "drop"] = "orthonormal",
    target: Literal["transformers", "transformer_lens"] | None = None,
    dtype: Literal["float32", "float64", "bfloat16"] = "float32",
    revision: str | None = None,
    tokenizer: str | None = None,
    sigma: Path | None = None,
    check: bool = True,
    dry_run: bool = False,
) -> None:
    """Turn a checkpoint into another with the same logits, and prove it.

    Reads a hub id, a Hugging Face folder, the published LN-free formats (recognised from their
    content), a nanoGPT ckpt.pt, or a folder that this package wrote. Writes weights as safetensors,
    config, tokenizer, a model card with the measured errors, and lnfree.json.

    Args:
        source: Hub id, folder or ckpt.pt.
        out: Folder to write; must not hold anything yet.
        form: For LN-free checkpoints: constants folded into the weights (the default), or kept in
            the norms.
        to_norm: Convert live LayerNorms to RMSNorms, or to CRMSNorms with one dimension less.
        basis: Of the CRMS residual stream: an isometry, or the last coordinate dropped.
        target: Layout of the result. Default: for plain transformers where it has a class for it.
        dtype: Of the weights.
        revision: Branch, tag or commit on the hub.
        tokenizer: Hub id or folder of the tokenizer, for a checkpoint that has none.
        sigma: JSON file with the constant of each norm, for a ckpt.pt, which does not state them.
        check: Compare logits with transformers after loading.
        dry_run: Load and say what would be done; write nothing.
    """
    from lnfree_interp.files import require_writable

    require_writable(out)
    print("importing torch, transformers and transformer_lens ...", flush=True)
    _quiet_libraries()
    import torch

    from lnfree_interp.checkpoints import converting
    from lnfree_interp.checkpoints.source import read_tokenizer

    constants = None if sigma is None else converting.read_sigma(sigma)
    own_tokenizer = None if tokenizer is None else read_tokenizer(tokenizer)
    converting.convert(
        source,
        out,
        form=form,
        to_norm=to_norm,
        basis=basis,
        target=target,
        dtype=getattr(torch, dtype),
        revision=revision,
        tokenizer=own_tokenizer,
        sigma=constants,
        check=check,
        dry_run=dry_run,
        say=_say,
    )
    if dry_run:
        print("dry run: nothing was written")


def evaluate(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")],
    /,
    against: str | None = None,
    data: str = "stdlib",
    blocks: int | None = None,
    block: int | None = None,
    split: str | None = None,
    data_name: str | None = None,
    column: str | None = None,
    data_revision: str | None = None,
    threshold: float = 3.5,
    effects: bool = True,
    neurons: int = 3,
    pairs: int = 16,
    tasks: tuple[str, ...] = (),
    include: Path | None = None,
    limit: int | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "float32",
    batch: int | None = None,
    out: Path | None = None,
) -> None:
    """Is an LN-free model still its original? Several models side by side, one table, one JSON.

    Cross-entropy beyond the mean, entropy and calibration, residual norms and attention sinks, what
    attribution says against what is measured, attribution patching, confidence neurons, tasks of
    the lm-evaluation-harness.

    Args:
        models: Hub ids, local folders, or folders that lnfree wrote.
        against: The original, which the others are compared with; it is evaluated too.
        data: openwebtext-val, pile-10k, pile-10k-filtered; stdlib; local files; else a data set
            on the hub.
        blocks: Of text. Default: all of a named text or of stdlib, else 256.
        block: Tokens per block. Default: the smallest context of the models, up to 1024.
        split: Of the data set. Default: heldout of stdlib, train of others.
        data_name: Configuration of a data set on the hub.
        column: Column with the text, or with token ids.
        data_revision: Of the data set on the hub.
        threshold: Count tokens that are worse than the original's by more than this, in nats.
        effects: Measure every head's direct effect against its attribution.
        neurons: Confidence neurons to find and ablate; 0 for none.
        pairs: Prompts for attribution patching against activation patching; 0 for none.
        tasks: Of the lm-evaluation-harness, such as hellaswag (needs the extra `tasks`).
        include: Folder with task files of your own.
        limit: Examples per task.
        precision: Of matrix products; auto takes bfloat16 where the hardware has it.
        batch: Blocks per forward pass. Default: what fits into memory.
        out: JSON file to write; must not exist yet.
    """
    from lnfree_interp.files import require_new_file

    if out is not None:
        require_new_file(out)
    _say("importing torch, transformers and transformer_lens ...")
    _quiet_libraries()
    from lnfree_interp.evaluation.job import evaluate_checkpoints

    evaluation = evaluate_checkpoints(
        models, against, data,
        blocks=blocks, block=block, split=split, name=data_name, column=column,
        revision=data_revision, precision=precision, progress=True, say=_say,
        threshold=threshold, effects=effects, neurons=neurons, pairs=pairs, tasks=tasks,
        include=include, limit=limit, batch=batch,
    )  # fmt: skip
    print(f"\n{evaluation.table().to_text()}")
    if out is not None:
        out.write_text(evaluation.to_json() + "\n", encoding="utf-8")
        print(f"\nwrote {out}")


def report(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_MODEL")],
    /,
    out: Path = Path("report.html"),
    against: str | None = None,
    data: str = "stdlib",
    blocks: int = 64,
    prompt: str | None = None,
    answer: str | None = None,
    foil: str | None = None,
) -> None:
    """Everything about a run or a model on one HTML page that needs no network.

    Args:
        source: A run's folder, what lnfree demo wrote, or a model: hub id or local folder.
        out: The page; must not exist yet.
        against: The original. Default: what a run says it started from.
        data: Text to evaluate on, as for lnfree evaluate.
        blocks: Of text, 256 tokens each at most.
        prompt: Explain what follows this, instead of prompts about Python source.
        answer: The next token to explain; mind the leading space.
        foil: The token that it is compared with.
    """
    from lnfree_interp.files import require_new_file

    require_new_file(out)
    if (prompt is None) != (answer is None) or (foil is not None and prompt is None):
        raise DataError("--prompt, --answer and --foil belong together")
    _say("importing torch, transformers and transformer_lens ...")
    _quiet_libraries()
    from lnfree_interp.report import Question, write_report

    asked = [] if prompt is None or answer is None else [Question(prompt, answer, foil)]
    write_report(source, out, against=against, text=data, blocks=blocks, questions=asked, say=_say)
    _say(f"wrote {out}")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _quiet_libraries() -> None:
    """Their progress bars and advice would drown ours."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main() -> None:
    """Run a command. Exit status: 2 for what the user can mend, 130 after Ctrl-C."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "demo": demo,
                "remove": remove,
                "convert": convert,
                "evaluate": evaluate,
                "report": report,
            },
            prog="lnfree",
            description="Remove a transformer's LayerNorms; read its logits as sums of parts.",
        )
    except LnfreeError as error:
        print(f"lnfree: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        removing = sys.argv[1:2] == ["remove"]
        left = "go on with lnfree remove --resume RUN" if removing else "nothing was written"
        print(f"\nlnfree: interrupted; {left}", file=sys.stderr)
        sys.exit(130)
