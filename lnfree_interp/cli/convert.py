"""`lnfree convert`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from lnfree_interp.cli.terminal import import_libraries, say


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
    """Convert a checkpoint into another with the same logits, and measure the difference.

    Reads a hub id, a Hugging Face folder, the published LN-free formats (recognised from their
    content), a GGUF file, a nanoGPT ckpt.pt, or a folder that this package wrote. Writes weights as
    safetensors, config, tokenizer, a model card with the measured errors, and lnfree.json.

    Args:
        source: Hub id, folder, model.gguf or ckpt.pt.
        out: Folder to write; it must be new or empty.
        form: Form of an LN-free checkpoint: folded, its constants are in the weights (the default);
            frozen, they are in the norms.
        to_norm: Convert live LayerNorms to RMSNorms (rms), or to CRMSNorms with one dimension less
            (crms).
        basis: Basis of the CRMS residual stream: orthonormal, an isometry; drop, without the last
            coordinate.
        target: Layout of the result. Default: transformers if it has a class for the model.
        dtype: Dtype of the weights.
        revision: Branch, tag or commit of the checkpoint on the hub.
        tokenizer: Hub id or folder of the tokenizer, or a GGUF file that has it, for a checkpoint
            that has none.
        sigma: JSON file with the constant of each norm, for a ckpt.pt, which does not contain them.
        check: Compare the logits with those of transformers after loading.
        dry_run: Load the checkpoint and say what would be done, without writing.
    """
    from lnfree_interp.files import require_writable

    require_writable(out)
    import_libraries()
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
        say=say,
    )
    if dry_run:
        print("dry run: nothing was written")
