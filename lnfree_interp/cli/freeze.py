"""`lnfree freeze`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lnfree_interp.cli.memory import keep_freed_memory
from lnfree_interp.cli.terminal import import_libraries, say
from lnfree_interp.removal.freeze_options import FreezeJob


def freeze(
    job: Annotated[FreezeJob, arg(name="")],
    out: Path = Path("lnfree-frozen"),
    resume: bool = False,
) -> None:
    """Freeze only the norms that a question reads through, and say what that costs.

    Writes OUT in TransformerLens' layout, which `lf.load(OUT)` opens: on it these questions are
    exact, and all others are refused or held by name. With --steps, checkpoints and metrics of the
    training are in OUT-training.

    Args:
        job: What to do.
        out: Folder to write; it must be new or empty.
        resume: Continue a training that was interrupted, in OUT-training: give the same options.
    """
    keep_freed_memory()
    import_libraries()
    from lnfree_interp.removal.freeze_job import run_job

    run_job(job, out, resume=resume, say=say)
    say(f"wrote {out}")
