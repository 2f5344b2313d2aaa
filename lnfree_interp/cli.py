"""The command line: `lnfree demo`, `lnfree convert`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lnfree_interp.errors import LnfreeError


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
    OUT with model/, metrics.json and report.html. About six minutes on two CPU cores.

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


def _say(line: str) -> None:
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
            {"demo": demo, "convert": convert},
            prog="lnfree",
            description="Remove a transformer's LayerNorms; read its logits as sums of parts.",
        )
    except LnfreeError as error:
        print(f"lnfree: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nlnfree: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
