"""`lnfree remove`."""

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lnfree_interp.cli.memory import keep_freed_memory
from lnfree_interp.cli.terminal import import_libraries, say
from lnfree_interp.errors import RecipeError
from lnfree_interp.removal.job import RemovalJob


def remove(
    job: Annotated[RemovalJob, arg(name="")],
    out: Path = Path("lnfree-run"),
    plan: bool = False,
    resume: Path | None = None,
    minutes: float | None = None,
) -> None:
    """Remove a model's norms by fine-tuning it, on your own text.

    Writes OUT with run.json, metrics.jsonl, checkpoints/ and, at the end, model/. `lnfree remove
    --resume OUT` continues a run that was interrupted. With several processes:
    `accelerate launch -m lnfree_interp remove ...`.

    Args:
        job: What to do.
        out: Folder to write; it must be new or empty.
        plan: Measure as a run does, say what would be done, time a few steps to say how long it
            takes here, and stop.
        resume: Continue the run in this folder. All options but --minutes are taken from there.
        minutes: Pause after so many minutes, loading included, with a checkpoint and exit status
            75; --resume continues. For machines that end a job after some time.
    """
    from lnfree_interp.files import require_writable

    if resume is not None and plan:
        raise RecipeError(
            "--plan is about a run that has not begun: leave it out to continue the run of "
            "--resume, whose recipe is in its run.json"
        )
    if resume is None and not plan:
        require_writable(out)
    keep_freed_memory()
    import_libraries()
    from lnfree_interp.removal.run_job import resume_job, run_job

    progress = os.environ.get("RANK", "0") == "0"
    if resume is not None:
        out, run = resume, resume_job(resume, minutes=minutes, progress=progress, say=say)
    else:
        run = run_job(job, out, only_plan=plan, minutes=minutes, progress=progress, say=say)
    if run is None:
        say("nothing was trained")
        return
    last = run.history[-1]
    say(f"{len(run.history)} steps; loss of the last batch {last.loss:.4f} nats per token")
    if heldouts := [record.heldout for record in run.history if record.heldout is not None]:
        say(f"held-out cross-entropy {heldouts[-1]:.4f} nats per token at the last evaluation")
    say(f"wrote {out}/model, metrics.jsonl and checkpoints/")
