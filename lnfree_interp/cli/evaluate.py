"""`lnfree evaluate`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lnfree_interp.cli.terminal import import_libraries, say
from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.job import EvaluationJob


def evaluate(job: Annotated[EvaluationJob, arg(name="")], out: Path | None = None) -> None:
    """Compare models, such as an LN-free one and its original, in one table and one JSON file.

    Cross-entropy and its tail, entropy and calibration, residual norms and attention sinks,
    attribution against measured effects, attribution patching, confidence neurons, and tasks of the
    lm-evaluation-harness.

    Args:
        job: What to do.
        out: JSON file to write; it must not exist yet.
    """
    from lnfree_interp.files import require_new_file, write_new_file

    if not job.models and job.original is None:
        raise DataError("name at least one model")
    if out is not None:
        require_new_file(out)
    import_libraries()
    from lnfree_interp.evaluation.run_job import run_job

    evaluation = run_job(job, say=say)
    print(f"\n{evaluation.table().to_text()}")
    if evaluation.bos_policy is not None:
        print(f"tasks: {evaluation.bos_policy}")
    if out is not None:
        write_new_file(out, evaluation.to_json() + "\n")
        print(f"\nwrote {out}")
