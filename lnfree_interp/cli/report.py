"""`lnfree report`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lnfree_interp.cli.terminal import import_libraries, say
from lnfree_interp.report.job import ReportJob


def report(job: Annotated[ReportJob, arg(name="")], out: Path = Path("report.html")) -> None:
    """Write what is known about a run or a model on one HTML page that needs no network.

    Args:
        job: What to do.
        out: The page; it must not exist yet.
    """
    from lnfree_interp.files import require_new_file

    require_new_file(out)
    import_libraries()
    from lnfree_interp.report.write import write_report

    write_report(job, out, say=say)
    say(f"wrote {out}")
