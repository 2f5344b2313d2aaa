"""Help with particular file formats: `lf.formats`.

Most people need `lf.load`, `lf.export` and `lf.convert` alone. Here are the steps between: a
checkpoint as a model of `transformers`, a model in memory as one, the sidecar of an exported
folder, and the constants of a nanoGPT run.
"""

from lnfree_interp.checkpoints.exporting import to_transformers
from lnfree_interp.checkpoints.published import nanogpt_sigma
from lnfree_interp.checkpoints.sidecar import Sidecar, read_sidecar
from lnfree_interp.checkpoints.source import open_in_transformers

__all__ = ["Sidecar", "nanogpt_sigma", "open_in_transformers", "read_sidecar", "to_transformers"]
