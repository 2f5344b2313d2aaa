"""What the commands offer: help without heavy imports, and options that fit the calls."""

import inspect
import re
import subprocess
import sys
import types
from dataclasses import fields
from importlib.metadata import version
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import lnfree_interp as lf
from lnfree_interp import cli
from lnfree_interp.cli.convert import convert
from lnfree_interp.evaluation.job import EvaluationJob
from lnfree_interp.removal.freeze_options import FreezeJob
from lnfree_interp.removal.job import RECIPES, RemovalJob
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.recipes import BY_NAME
from lnfree_interp.removal.settings import Special, Statistics
from lnfree_interp.report.job import ReportJob

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
COMMANDS = ["", "demo", "remove", "freeze", "convert", "evaluate", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    arguments = [sys.executable, "-c", HELP, *([command] if command else [])]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, _, modules = done.stdout.partition("modules:")
    assert f"usage: lnfree {command}".strip() in shown
    assert not re.search(r"None|\[STR|default: False", shown)
    assert HEAVY & set(modules.split()) == set()


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("remove", ["model", "text", "training", "schedule", "sigma", "special token", "record"]),
        ("freeze", ["model", "text", "freezing"]),
        ("evaluate", ["model", "text", "measure", "task"]),
        ("report", ["model", "text", "prompt"]),
    ],
)
def test_options_are_in_groups(command, groups, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lnfree", command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert re.findall(r"^\W*(\w[\w ]*) options\W*$", shown, re.MULTILINE) == groups
    jobs = {
        "remove": RemovalJob, "freeze": FreezeJob, "evaluate": EvaluationJob, "report": ReportJob,
    }  # fmt: skip
    flags = set(re.findall(r"--([\w-]+)", shown))
    positional = {"model", "models", "source"}
    names = {field.name.replace("_", "-") for field in fields(jobs[command])}
    assert names - positional <= flags


def test_the_text_of_an_option_has_no_line_breaks_of_the_source(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["lnfree", "convert", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "(the default); frozen, they are in the norms. " in capsys.readouterr().out


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lnfree", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"lnfree {version('lnfree_interp')}\n"


def test_the_recipes_have_their_names_without_an_import():
    assert tuple(BY_NAME) == RECIPES
    source = inspect.getsource(RemovalJob.__bases__[0])
    assert [name for name in RECIPES if name not in source] == []


def test_options_of_a_removal_replace_settings_of_the_recipe():
    """Those with the name of a setting have its type."""
    theirs, ours = get_type_hints(Recipe), get_type_hints(RemovalJob)
    shared = [field.name for field in fields(RemovalJob) if field.name in theirs]
    assert len(shared) == 17
    for name in set(shared) - {"release"}:  # words, which Release.parse reads
        plain = set(get_args(ours[name])) - {types.NoneType}
        assert plain & {theirs[name], *get_args(theirs[name])}, name


@pytest.mark.parametrize(("settings", "prefix"), [(Statistics, "sigma_"), (Special, "special_")])
def test_every_part_of_sigma_and_of_special_tokens_is_an_option(settings, prefix):
    theirs, ours = get_type_hints(settings), get_type_hints(RemovalJob)
    for field in fields(settings):
        mine = ours[prefix + field.name]
        assert choices(mine) == choices(theirs[field.name]) - {"ln1"}, field.name  # is two sites
        if not choices(mine):
            assert mine == theirs[field.name] | None, field.name


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
