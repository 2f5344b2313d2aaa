"""Every snippet of README.md and docs/ runs; commands are parsed and not run.

A block that cannot run here has a comment before it, `<!-- not run: REASON -->`. One that needs
SmolLM2 has `<!-- needs: make smollm2 -->`, and runs with the other tests that do.
"""

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

import lnfree_interp as lf
from lnfree_interp import cli
from lnfree_interp.checkpoints import loading
from lnfree_interp.data import sources
from lnfree_interp.removal import losses
from lnfree_interp.removal.schedule import sites_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_AT_LEAST = 26
"""Blocks of Python without a comment, when this was last counted."""
FREE = "lnfree-demo/model"
ON_THE_HUB = {
    "gpt2": None,
    "schaeff/gpt2-small_LNFree300": FREE,
    "apollo-research/gpt2_noLN": FREE,
}
"""What stands for a model on the hub: None for the bundled one, with norms."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    not_run: str | None
    needs: str | None


def blocks(page: Path) -> Iterator[Block]:
    lines, reason, needs, start = page.read_text().splitlines(), None, None, None
    language, body = "", []
    for number, line in enumerate(lines, 1):
        fence = re.fullmatch(r"\s*```(\w*)", line)
        if start is None and fence and fence[1]:
            language, start, body = fence[1], number, []
        elif start is not None and fence:
            yield Block(page, start, language, "\n".join(body), reason, needs)
            start, reason, needs = None, None, None
        elif start is not None:
            body.append(line)
        elif found := re.fullmatch(r"<!-- not run: (.+) -->", line.strip()):
            reason = found[1]
        elif found := re.fullmatch(r"<!-- needs: (make smollm2) -->", line.strip()):
            needs = found[1]
        elif line.strip():
            reason, needs = None, None


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


PYTHON = {
    page: [block for block in blocks(page) if block.language == "python"]
    for page in PAGES
    if "```python" in page.read_text()
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """What `lnfree demo` writes, as far as pages use it."""
    sited = lf.with_norm_sites(lf.load(lf.bundled_checkpoint()))
    for site in lf.list_norm_sites(sited):
        lf.freeze_site(sited, site, 1.0)
    folder = tmp_path_factory.mktemp("snippets") / FREE
    lf.export(sited, folder)
    return folder.parent


@pytest.fixture
def names(demo, tmp_path, monkeypatch) -> dict[str, Any]:
    """Nothing: a page says where everything comes from. In an empty folder, with stand-ins for the
    hub, and for long runs and much text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lnfree-demo").symlink_to(demo)
    load, distilled, evaluation_text = loading.load, lf.recipes.distilled, lf.evaluation_text
    corpus = lf.stdlib_corpus

    def load_here(source, **more):
        there = ON_THE_HUB.get(str(source), source)
        return load(lf.bundled_checkpoint() if there is None else there, **more)

    def in_few_steps(model, **more):
        more["steps"] = len(sites_of(model))
        recipe = distilled(model, **more)
        statistics = replace(recipe.statistics, sequences=2)
        return replace(recipe, batch=2, micro_batch=2, sequence_length=None, statistics=statistics)

    def quick(make):
        def made(**more):
            return replace(make(**more), steps=2, batch=2, micro_batch=2, warmup=0)

        return made

    def of_few_modules(split):
        return corpus(split).select(range(20))

    def of_little_text(*args, **more):
        return evaluation_text(*args, **more)[:4]

    monkeypatch.setattr(lf, "load", load_here, raising=False)
    monkeypatch.setattr(lf, "evaluation_text", of_little_text, raising=False)
    monkeypatch.setattr(lf, "stdlib_corpus", of_few_modules, raising=False)
    monkeypatch.setattr(sources, "stdlib_corpus", of_few_modules)
    monkeypatch.setattr(lf.recipes, "distilled", in_few_steps)
    for recipe in ("from_scratch", "finetuning"):
        monkeypatch.setattr(lf.recipes, recipe, quick(getattr(lf.recipes, recipe)))
    monkeypatch.setattr(losses, "TERMS", dict(losses.TERMS))
    return {}


@pytest.mark.filterwarnings("ignore::lnfree_interp.errors.HeldWarning")
@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_the_snippets_of_a_page_run(page, names):
    for block in PYTHON[page]:
        if block.not_run is None and block.needs is None:
            execute(block, names)


def execute(block, names):
    names["__name__"] = "snippet"
    code = "\n" * block.line + block.code
    with torch.enable_grad():
        exec(compile(code, name(block.page), "exec"), names)


@pytest.mark.smollm2
@pytest.mark.filterwarnings("ignore::lnfree_interp.errors.HeldWarning")
@pytest.mark.parametrize(
    "block",
    [block for page in PYTHON.values() for block in page if block.needs],
    ids=lambda block: f"{name(block.page)}:{block.line}",
)
def test_a_snippet_that_needs_smollm2_runs(block, names):
    execute(block, names)


def test_hardly_a_snippet_is_left_out():
    found = [block for page in PYTHON.values() for block in page]
    assert sum(block.not_run is None for block in found) >= RUN_AT_LEAST


def _commands() -> Iterator[tuple[str, str]]:
    """Each line that calls `lnfree`, in a block or in a sentence, with where it stands."""
    for page in PAGES:
        shell = [block.code for block in blocks(page) if block.language == "sh"]
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        spoken = re.findall(r"`(lnfree (?:demo|remove|convert|evaluate|report) [^`]+)`", prose)
        launched = re.findall(r"-m lnfree_interp (.*)", re.sub(r"\\\n\s*", "", prose))
        lines = [line for code in shell for line in code.splitlines()]
        for line in [*lines, *spoken, *(f"lnfree {rest}" for rest in launched)]:
            if line.startswith("lnfree "):
                yield name(page), line


@pytest.mark.parametrize(("page", "line"), sorted(set(_commands())))
def test_a_command_has_the_options_that_a_page_gives_it(page, line, monkeypatch):
    command, *arguments = shlex.split(line, comments=True)[1:]
    asked = []
    parse = tyro.extras.subcommand_cli_from_dict

    def parse_alone(commands: dict[str, Any], **more: Any) -> None:
        @functools.wraps(commands[command])
        def call(*args: Any, **named: Any) -> None:
            asked.append(command)

        parse({**commands, command: call}, args=[command, *arguments], **more)

    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", parse_alone)
    cli.main()
    assert asked == [command]
