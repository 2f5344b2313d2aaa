"""What the reference says: complete for every public name, and its examples run."""

import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import pytest

DOCS = Path(__file__).parents[1] / "docs" / "api"
Sections = dict[str, Any]


def _public() -> Iterator[tuple[str, Any]]:
    import lnfree_interp as lf
    from lnfree_interp.data import sources

    for name in lf.__all__:
        member = getattr(lf, name)
        if not inspect.ismodule(member):
            yield name, member
    for name in lf.formats.__all__:
        yield f"formats.{name}", getattr(lf.formats, name)
    for name in lf.plots.__all__:
        if name != "circuits":
            yield f"plots.{name}", getattr(lf.plots, name)
    homes = {"recipes": lf.recipes, "plots.circuits": lf.plots.circuits}
    for prefix, home in homes.items():
        for name, member in inspect.getmembers(home, inspect.isfunction):
            if member.__module__ == home.__name__ and not name.startswith("_"):
                yield f"{prefix}.{name}", member
    yield "open_text", sources.open_text


PUBLIC = dict(_public())
FUNCTIONS = sorted(
    name for name, member in PUBLIC.items() if inspect.isfunction(inspect.unwrap(member))
)
CLASSES = sorted(name for name, member in PUBLIC.items() if inspect.isclass(member))


def _path(member: Any) -> str:
    member = inspect.unwrap(member)
    return f"{member.__module__}.{member.__qualname__}"


@pytest.fixture(scope="module")
def package() -> griffe.Module:
    return griffe.load("lnfree_interp", docstring_parser="google")


def _member(package: griffe.Module, member: Any) -> Any:
    return package[_path(member).removeprefix("lnfree_interp.")]


def _sections(member: Any) -> Sections:
    assert member.docstring is not None, member.path
    parsed = member.docstring.parse("google", warn_missing_types=False)
    return {section.kind.value: section.value for section in parsed}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_results_and_errors_are_described(name: str, package: griffe.Module):
    function = _member(package, PUBLIC[name])
    sections = _sections(function)
    expected = [p.name for p in function.parameters]
    assert [p.name.lstrip("*") for p in sections.get("parameters", [])] == expected
    if str(function.returns) != "None":
        assert "returns" in sections, f"{name} does not say what it returns"
    source = inspect.getsource(inspect.unwrap(PUBLIC[name]))
    raised = set(re.findall(r"raise (\w+)", source))
    said = " ".join(
        str(error.annotation) + error.description for error in sections.get("raises", [])
    )
    assert {error for error in raised if error not in said} == set()
    assert "examples" in sections, f"{name} has no example"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_methods_name_their_source(name: str, package: griffe.Module):
    """A paper, an address, or that it is ours: wherever a number is defined."""
    member = _member(package, PUBLIC[name])
    homes = (
        "analysis",
        "evaluation",
        "removal.published_recipes",
        "removal.recipes",
        "removal.remove",
        "removal.training",
        "variants",
    )
    if not member.path.startswith(tuple(f"lnfree_interp.{home}" for home in homes)):
        return
    sections = _sections(member)
    source = sections.get("admonition")
    assert source is not None, name
    assert source.kind == "source", name
    assert re.search(r"arXiv \d{4}\.\d{5}|https://|[Oo]urs", source.contents)


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_described(name: str, package: griffe.Module):
    described = _member(package, PUBLIC[name])
    listed = {attribute.name for attribute in _sections(described).get("attributes", [])}
    fields = getattr(PUBLIC[name], "__dataclass_fields__", {})
    silent = [
        field
        for field in fields
        if field not in listed
        and (field not in described.members or described[field].docstring is None)
    ]
    assert silent == []


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(page.read_text() for page in DOCS.glob("*.md"))
    listed = re.findall(r"^::: (\S+)", pages, flags=re.MULTILINE)
    missing = [
        name
        for name, member in PUBLIC.items()
        if _path(member) not in listed and inspect.unwrap(member).__module__ not in listed
    ]
    assert missing == []


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What every example may use: a model with norms, one without, and some text."""
    import lnfree_interp as lf

    model = lf.load(lf.bundled_checkpoint())
    sited = lf.with_norm_sites(model)
    for site in lf.list_norm_sites(sited):
        lf.freeze_site(sited, site, 1.0)
    tokens = lf.pack(lf.stdlib_corpus("heldout").select(range(20)), model.tokenizer, 64)[:4]
    return {"lf": lf, "model": model, "free": lf.fold(sited), "tokens": tokens}


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_examples_run(name: str, names: dict[str, Any], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.unwrap(PUBLIC[name]).__doc__ or ""
    test = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said: list[str] = []
    doctest.DocTestRunner(optionflags=flags).run(test, out=said.append)
    assert said == []
