"""The small GPT-2 that ships with the package, and how it was trained (`bundled.train`)."""

from pathlib import Path


def bundled_checkpoint() -> Path:
    """The folder of the bundled checkpoint, an ordinary Hugging Face one.

    A GPT-2 of 4 layers, 6 heads, d_model 192, context 256 and a byte-level BPE of 4096 tokens,
    trained on the source of Python's standard library.

    Returns:
        A path, for `load` or for `transformers`.

    Examples:
        >>> lf.load(lf.bundled_checkpoint()).cfg.n_layers
        4
    """
    return Path(__file__).parent / "checkpoint"
