"""`lnfree report`."""

from pathlib import Path
from typing import Annotated

import tyro

from lnfree_interp.cli.terminal import quiet_libraries, say
from lnfree_interp.errors import DataError


def report(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_MODEL")],
    /,
    out: Path = Path("report.html"),
    against: str | None = None,
    data: str = "stdlib",
    sequences: int = 64,
    prompt: str | None = None,
    answer: str | None = None,
    foil: str | None = None,
) -> None:
    """Everything about a run or a model on one HTML page that needs no network.

    Args:
        source: A run's folder, what lnfree demo wrote, or a model: hub id (ID@REVISION),
            or local folder.
        out: The page; must not exist yet.
        against: The original. Default: what a run says it started from.
        data: Text to evaluate on, as for lnfree evaluate.
        sequences: Of text, 256 tokens each at most.
        prompt: Explain what follows this, instead of prompts about Python source.
        answer: The next token to explain; mind the leading space.
        foil: The token that it is compared with.
    """
    from lnfree_interp.files import require_new_file

    require_new_file(out)
    if (prompt is None) != (answer is None) or (foil is not None and prompt is None):
        raise DataError("--prompt, --answer and --foil belong together")
    say("importing torch, transformers and transformer_lens ...")
    quiet_libraries()
    from lnfree_interp.report import Question, write_report

    asked = [] if prompt is None or answer is None else [Question(prompt, answer, foil)]
    write_report(
        source, out, against=against, text=data, sequences=sequences, questions=asked, say=say
    )
    say(f"wrote {out}")
