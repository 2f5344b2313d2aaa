"""The command line, in the tests' own process."""

import sys

import pytest

from lnfree_interp import cli


def lnfree(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`lnfree ARGUMENTS`; a refusal is a SystemExit."""
    monkeypatch.setattr(sys, "argv", ["lnfree", *map(str, arguments)])
    cli.main()
