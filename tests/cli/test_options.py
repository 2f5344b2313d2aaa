"""What the commands offer: help without heavy imports, and options that fit the calls."""

import inspect
import subprocess
import sys
import types
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import lnfree_interp as lf
from lnfree_interp.cli.convert import convert
from lnfree_interp.evaluation.job import EvaluationJob
from lnfree_interp.removal.job import RemovalJob
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.recipes import BY_NAME

HEAVY = {"torch", "transformers", "transformer_lens", "datasets", "plotly", "pandas", "numpy"}
HELP = """
import sys
from lnfree_interp import cli
sys.argv = ["lnfree", *sys.argv[1:], "--help"]
try:
    cli.main()
finally:
    print("modules:", *sys.modules)
"""


@pytest.mark.parametrize("command", ["", "demo", "remove", "convert", "evaluate", "report"])
def test_help_imports_nothing_heavy(command):
    arguments = [sys.executable, "-c", HELP, *([command] if command else [])]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, _, modules = done.stdout.partition("modules:")
    assert f"usage: lnfree {command}".strip() in shown
    assert HEAVY & set(modules.split()) == set()


def test_the_recipes_are_those_that_the_help_names():
    source = inspect.getsource(RemovalJob)
    assert [name for name in BY_NAME if name not in source] == []


def test_options_of_a_removal_replace_settings_of_the_recipe():
    """Those with the name of a setting have its type."""
    theirs, ours = get_type_hints(Recipe), get_type_hints(RemovalJob)
    shared = [field.name for field in fields(RemovalJob) if field.name in theirs]
    assert len(shared) == 11
    for name in shared:
        plain = set(get_args(ours[name])) - {types.NoneType}
        assert plain & {theirs[name], *get_args(theirs[name])}, name


def choices(hint: Any) -> set[str]:
    """The words of a Literal, inside a union too."""
    inner = get_args(hint)
    if get_origin(hint) is not None and all(isinstance(one, str) for one in inner):
        return set(inner)
    return {word for one in inner for word in choices(one)}


@pytest.mark.parametrize(("command", "call"), [(EvaluationJob, lf.evaluate), (convert, lf.convert)])
def test_options_have_the_defaults_and_choices_of_the_call(command, call):
    theirs = inspect.signature(call).parameters
    ours = inspect.signature(command).parameters
    their_hints, our_hints = get_type_hints(inspect.unwrap(call)), get_type_hints(command)
    shared = [name for name in ours if name in theirs and name != "original"]
    assert len(shared) >= 9
    for name in shared:
        if name != "dtype":  # a word on the command line
            assert ours[name].default == theirs[name].default, name
            assert choices(our_hints[name]) - {"auto"} == choices(their_hints[name]), name
