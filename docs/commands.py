"""Puts what each command says with `--help` into commands.md, when the documentation is built."""

import os
import re
import subprocess
import sys
from typing import Any

_BOX = {r"^╭─ (.*?) ─*╮$": r"\1:", r"^│ ─+ │$": "", r"^│ (.*?) *│$": r"  \1", r"^╰─*╯$": ""}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page, with the help of every command behind it if it is commands.md."""
    if page.file.src_path != "commands.md":
        return markdown
    overview = _help()
    commands = re.findall(r"• (\w+) ", overview.partition("subcommands:")[2])
    if not commands:
        raise ValueError(f"lnfree --help names no commands:\n{overview}")
    parts = [f"## lnfree {name}\n\n```text\n{_help(name)}\n```\n" for name in commands]
    return "\n".join([markdown, f"```text\n{overview}\n```\n", *parts])


def _help(*command: str) -> str:
    asked = [sys.executable, "-m", "lnfree_interp", *command, "--help"]
    columns = {**os.environ, "COLUMNS": "100"}
    said = subprocess.run(asked, capture_output=True, text=True, check=True, env=columns).stdout
    for box, plain in _BOX.items():
        said = re.sub(box, plain, said, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", said).strip()
