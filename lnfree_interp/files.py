"""Files that appear complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lnfree_interp.errors import OutputExistsError


def require_free(out: str | os.PathLike[str]) -> None:
    """Refuse an output folder that already holds something.

    Raises:
        OutputExistsError: unless nothing or an empty folder stands there.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out} already exists: choose another folder or remove it")


@contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended without an exception.

    Raises:
        OutputExistsError: if something other than an empty folder stands there already.
    """
    require_free(out)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, out)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        raise
