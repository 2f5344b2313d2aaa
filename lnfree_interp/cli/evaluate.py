"""`lnfree evaluate`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from lnfree_interp.cli.terminal import quiet_libraries, say
from lnfree_interp.errors import DataError


def evaluate(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")],
    /,
    against: str | None = None,
    data: str = "stdlib",
    sequences: int | None = None,
    sequence_length: int | None = None,
    split: str | None = None,
    data_name: str | None = None,
    column: str | None = None,
    data_revision: str | None = None,
    threshold: float = 3.5,
    effects: bool = True,
    neurons: int = 3,
    pairs: int = 16,
    pairs_of: Literal["text", "ioi"] = "text",
    tasks: tuple[str, ...] = (),
    include: Path | None = None,
    limit: int | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "float32",
    batch: int | None = None,
    tokenizer: str | None = None,
    out: Path | None = None,
) -> None:
    """Is an LN-free model still its original? Several models side by side, one table, one JSON.

    Cross-entropy beyond the mean, entropy and calibration, residual norms and attention sinks, what
    attribution says against what is measured, attribution patching, confidence neurons, tasks of
    the lm-evaluation-harness.

    Args:
        models: Hub ids, at a revision as ID@REVISION; local folders; runs.
        against: The original, which the others are compared with; it is evaluated too. Default:
            what the run started from, if MODEL is one run.
        data: openwebtext-val, pile-10k, pile-10k-filtered; stdlib; local files; else a data set
            on the hub.
        sequences: Of text. Default: all of a named text or of stdlib, else 256.
        sequence_length: Tokens per sequence. Default: the smallest context of the models, up to 1024.
        split: Of the data set. Default: heldout of stdlib, train of others.
        data_name: Configuration of a data set on the hub.
        column: Column with the text, or with token ids.
        data_revision: Of the data set on the hub.
        threshold: Count tokens that are worse than the original's by more than this, in nats.
        effects: Measure every head's direct effect against its attribution.
        neurons: Confidence neurons to find and ablate; 0 for none.
        pairs: Prompts for attribution patching against activation patching; 0 for none.
        pairs_of: text: one token of the text replaced; ioi: two names swapped in prompts about an
            indirect object, as published with 480 of them.
        tasks: Of the lm-evaluation-harness, such as hellaswag (needs the extra `tasks`).
        include: Folder with task files of your own.
        limit: Examples per task.
        precision: Of matrix products; auto takes bfloat16 where the hardware has it.
        batch: Sequences per forward pass. Default: what fits into memory.
        tokenizer: Hub id or folder of the tokenizer, for checkpoints that have none.
        out: JSON file to write; must not exist yet.
    """
    from lnfree_interp.files import require_new_file, write_new_file

    if not models and against is None:
        raise DataError("name at least one model")

    if out is not None:
        require_new_file(out)
    say("importing torch, transformers and transformer_lens ...")
    quiet_libraries()
    from lnfree_interp.evaluation.job import evaluate_checkpoints

    evaluation = evaluate_checkpoints(
        models, against, data,
        sequences=sequences, sequence_length=sequence_length, split=split, name=data_name, column=column,
        revision=data_revision, precision=precision, progress=True, say=say,
        threshold=threshold, effects=effects, neurons=neurons, pairs=pairs, pairs_of=pairs_of,
        tasks=tasks, include=include, limit=limit, batch=batch, tokenizer=tokenizer,
    )  # fmt: skip
    print(f"\n{evaluation.table().to_text()}")
    if evaluation.bos_policy is not None:
        print(f"tasks: {evaluation.bos_policy}")
    if out is not None:
        write_new_file(out, evaluation.to_json() + "\n")
        print(f"\nwrote {out}")
