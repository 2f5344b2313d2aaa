"""The Python standard library's own source: text that every machine with Python has.

A new user may have no network, so the bundled model was trained, and the demo runs, on the modules
of the running interpreter. A hash of a module's path decides whether it is held out, so a module is
in the same split on every Python version. Only code that a later version copies from one module to
another can still be in both.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from datasets import Dataset

from lnfree_interp.errors import DataError

Split = Literal["train", "heldout"]

HELDOUT_ONE_IN = 10
"""One module in this many is held out."""

MIN_DOCUMENTS = 100
"""With fewer modules than this, Python was installed without the source of its library."""

# Not the library's own source (site-packages), its tests, or tables that a generator wrote.
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
)


# Modules that a later Python moved stay in the split of Python 3.11, on whose source the bundled
# checkpoint was trained.
_MOVED = {
    "pathlib": "pathlib.py",  # 3.13
    "sysconfig": "sysconfig.py",  # 3.13
    "string": "string.py",  # 3.14
    "_pydatetime.py": "datetime.py",  # 3.12
    "_ast_unparse.py": "ast.py",  # 3.14
    "_py_warnings.py": "warnings.py",  # 3.14
}


def split_of(module_path: str) -> Split:
    """The split of a module, decided by a hash of its path.

    Args:
        module_path: Path below the library's root with forward slashes, e.g. `json/decoder.py`.
    """
    original = _MOVED.get(module_path.partition("/")[0], module_path)
    digest = hashlib.sha256(original.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):  # a handful of sources declare another encoding
                continue
            if text.strip():
                yield relative.as_posix(), text


def stdlib_corpus(split: Split, root: Path | None = None) -> Dataset:
    """The standard library's modules as documents.

    Args:
        split: `"train"` or `"heldout"`; a module's split never depends on the Python version.
        root: The library's folder. Default: that of the running interpreter.

    Returns:
        A `datasets.Dataset` with the columns `path` and `text`, sorted by path.

    Raises:
        DataError: if there is almost no source in the folder.

    Examples:
        >>> corpus = lf.stdlib_corpus("heldout")
        >>> corpus.column_names
        ['path', 'text']
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    documents = [
        {"path": path, "text": text} for path, text in _modules(root) if split_of(path) == split
    ]
    if len(documents) * (HELDOUT_ONE_IN if split == "heldout" else 1) < MIN_DOCUMENTS:
        raise DataError(
            f"only {len(documents)} {split} modules of the standard library are below {root}: this "
            "Python was installed without its source; use another one or give your own text"
        )
    return Dataset.from_list(documents)
