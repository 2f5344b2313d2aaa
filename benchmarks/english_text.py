"""English text for benchmarks, from Debian's documentation packages: one JSON line per document.

    python benchmarks/english_text.py text.jsonl

It needs `apt-get` and `dpkg` of Debian 12, which has these packages, and no rights. Translations in
the kernel's documentation are left out. Documents are in a random order that is the same on every
machine with these versions of the packages.
"""

import gzip
import html
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tyro
from tyro.conf import Positional

PACKAGES = ("debian-handbook", "python3.11-doc", "linux-doc-6.1")
SHORTEST = 500
"""Characters; shorter documents are tables of contents."""
LATIN = 0.95
"""The least share of ASCII characters."""


def fetch(folder: Path) -> Path:
    """Download and unpack the packages."""
    for name in PACKAGES:
        subprocess.run(["apt-get", "download", "-q", name], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package.name, "unpacked"], cwd=folder, check=True)
    return folder / "unpacked"


def documents(folder: Path) -> Iterator[str]:
    """The text of each document, the same for every order of the file system."""
    for path in sorted(folder.rglob("*")):
        name = str(path)
        if "/translations/" in name:
            continue
        if name.endswith((".rst.txt", ".rst")):
            yield path.read_text(encoding="utf-8", errors="ignore")
        elif name.endswith(".rst.gz"):
            yield gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
        elif "/html/en-US/" in name and name.endswith(".html"):
            body = path.read_text(encoding="utf-8", errors="ignore")
            body = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", body)
            plain = html.unescape(re.sub(r"<[^>]+>", "", body))
            yield re.sub(r"\n\s*\n\s*", "\n\n", plain)


def is_english(text: str) -> bool:
    """Whether a document is in plain Latin letters; not all translations are in that folder."""
    return sum(map(str.isascii, text)) >= LATIN * len(text)


def main(out: Positional[Path]) -> None:
    """Write the text.

    Args:
        out: The file to write, one JSON object with a field `text` on each line.
    """
    with tempfile.TemporaryDirectory() as folder:
        every = documents(fetch(Path(folder)))
        texts = [text for text in every if len(text) >= SHORTEST and is_english(text)]
    random.Random(0).shuffle(texts)
    with out.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    print(f"{len(texts):,} documents, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    tyro.cli(main)
