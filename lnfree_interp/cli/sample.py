"""`lnfree sample`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from lnfree_interp.cli.terminal import import_libraries, say


def sample(
    model: Annotated[Positional[str | None], arg(metavar="[MODEL]")] = None,
    out: Path = Path("sampled.jsonl"),
    sequences: int = 2000,
    sequence_length: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    revision: str | None = None,
) -> None:
    """Let a model write text to train on, so that a removal needs no corpus.

    Writes OUT, a row of token ids for each sequence. Interrupted, the same command continues it.

    Args:
        model: Hub id, local Hugging Face folder or GGUF file. Default: the small GPT-2 that ships
            with the package.
        out: .jsonl file to write or to continue.
        sequences: How many sequences.
        sequence_length: Tokens of each, behind the beginning-of-text token that is one of them.
        temperature: Divides the logits before a token is drawn; below 1 the text is more uniform.
        seed: Random seed.
        revision: Branch, tag or commit of the model on the hub.
    """
    import_libraries()
    from lnfree_interp.bundled import bundled_checkpoint
    from lnfree_interp.checkpoints.loading import load
    from lnfree_interp.data.sampled import write_samples

    source = str(bundled_checkpoint()) if model is None else model
    say(f"loading {source if model is not None else 'the bundled checkpoint'}")
    loaded = load(source, revision=revision)
    kept = write_samples(
        loaded, out, sequences, sequence_length, temperature=temperature, seed=seed
    )
    if kept:
        say(f"{kept} sequences were there already")
    has_bos = getattr(loaded.tokenizer, "bos_token_id", None) is not None
    say(f"wrote {out}; to train on it:")
    say(
        f"    lnfree remove {'' if model is None else f'{model} '}--data {out} "
        f"--sequence-length {sequence_length}{' --prepend-bos' if has_bos else ''}"
    )
