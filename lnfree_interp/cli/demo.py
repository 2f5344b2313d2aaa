"""`lnfree demo`."""

from pathlib import Path
from typing import Annotated

import tyro

from lnfree_interp.cli.memory import keep_freed_memory
from lnfree_interp.cli.terminal import import_libraries, say


def demo(
    checkpoint: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CHECKPOINT]")
    ] = None,
    /,
    out: Path = Path("lnfree-demo"),
    steps: int = 250,
    seed: int = 0,
) -> None:
    """Remove every norm from a pretrained model, and measure the result.

    Loads a checkpoint, removes its norms by a short fine-tuning on the source of Python's standard
    library, trains a control that keeps them, folds, evaluates, attributes logits, and writes OUT
    with model/, control/, metrics.json and report.html. Five to ten minutes on two CPU cores.

    Args:
        checkpoint: Hub id or local Hugging Face folder. Default: the small GPT-2 that ships with
            the package.
        out: Folder to write; it must be new or empty.
        steps: Optimiser steps of the removal, and of its control.
        seed: Random seed of the order of the training text.
    """
    from lnfree_interp.files import require_writable

    require_writable(out)
    keep_freed_memory()
    import_libraries()
    from lnfree_interp.demo import run_demo

    result = run_demo(out, checkpoint, steps=steps, seed=seed, say=say)
    for table in result.tables():
        print(f"\n{table.to_text()}")
    print(f"\nLN-free minus vanilla on held-out text: {result.gap:+.4f} nats per token")
    print(f"took {result.seconds / 60:.1f} minutes; wrote")
    for name in ("report.html", "metrics.json", "model/", "control/"):
        print(f"  {out / name}")
