"""Writing files and folders so that nothing incomplete ever has the final name."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path

from lnfree_interp.errors import OutputError


def require_writable(out: str | os.PathLike[str]) -> Path:
    """Check, before any work is done, that an output folder can be written.

    Returns:
        The path, absolute.

    Raises:
        OutputError: if the path exists and is not an empty folder, or cannot be written.
    """
    path = Path(out).absolute()
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{out} already exists: choose another folder or remove it")
    if path == Path.cwd():
        raise OutputError(f"{out} is the current folder: give a folder inside it")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{out} cannot be written: {parent} is not a writable folder, so choose another"
        )
    if len(os.fsencode(path.name)) > 200:
        raise OutputError(
            f"the name {path.name[:40]}... is too long for a folder: give one of at most 200 bytes"
        )
    return path


def require_new_file(out: str | os.PathLike[str]) -> Path:
    """Check, before any work is done, that a new file can be written.

    Raises:
        OutputError: if the path exists already, or its folder cannot be written.
    """
    path = Path(out).absolute()
    if os.path.lexists(path):
        raise OutputError(f"{out} already exists: choose another name or remove it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{out} cannot be written: {path.parent} is not a writable folder, so choose another"
        )
    return path


def anywhere(name: str | os.PathLike[str]) -> str:
    """A local path, or a pattern of paths, as an absolute path; any other name unchanged."""
    text = os.fspath(name)
    if os.path.exists(text) or has_magic(text):
        return os.path.abspath(text)
    return text


def write_new_file(out: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write text or bytes to a new file, which gets its name only when it is complete.

    Raises:
        OutputError: as for `require_new_file`, or if writing fails.
    """
    path, data = require_new_file(out), content.encode() if isinstance(content, str) else content
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            written = Path(folder) / "text"
            written.write_bytes(data)
            try:
                os.link(written, path)  # fails if the path has appeared in the meantime
            except FileExistsError:
                raise
            except OSError:  # the file system has no links
                with path.open("xb") as file:
                    file.write(data)
    except FileExistsError as error:
        raise OutputError(
            f"{out} has appeared in the meantime and was not changed: choose another name"
        ) from error
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
    return path


def _open_to_readers(folder: Path) -> None:
    """Set the permissions that new files have: temporary folders and files of safetensors are
    private."""
    os.umask(hidden := os.umask(0o077))  # there is no other way to ask
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~hidden)


@contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that gets its name only when the block has ended without an exception.

    Raises:
        OutputError: as for `require_writable`, or if writing fails.
    """
    path = require_writable(out)
    made = [folder for folder in path.parents if not folder.exists()]
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        yield partial
        _open_to_readers(partial)
        os.replace(partial, path)
    except BaseException as error:  # includes Ctrl-C
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        # The writers of weights and tokenizers raise errors of their own types for a full disk.
        if isinstance(error, OSError) or "os error" in str(error) or "I/O error" in str(error):
            raise OutputError(f"{out} cannot be written: {error}") from error
        raise
