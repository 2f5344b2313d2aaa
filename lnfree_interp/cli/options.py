"""How options look: what tyro is told about the functions and jobs that commands are made of.

An option's text is its docstring, without the line breaks of the source. A job that is made of
several classes is shown in as many groups, named after them.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import docstring_parser
from tyro import MISSING
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, arg
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

CONFIG = (DisallowNone, OmitArgPrefixes)
"""No word for None, and no option with a dot in its name."""

REGISTRY = ConstructorRegistry()
"""Tells tyro how our functions and jobs are taken apart into options."""


@REGISTRY.struct_rule
def _options(info: StructTypeInfo) -> StructConstructorSpec | None:
    made: Any = info.type
    if not getattr(made, "__module__", "").startswith("lnfree_interp."):
        return None
    groups = made.__bases__ if inspect.isclass(made) else ()
    if len(groups) > 1:
        fields = tuple(StructFieldSpec(_title(one), _group(one), MISSING) for one in groups)
        return StructConstructorSpec(_from_groups(made), fields)
    declared = reversed(made.__mro__[:-1]) if inspect.isclass(made) else (made,)
    texts = {
        found.arg_name: " ".join((found.description or "").split())
        for one in declared
        for found in docstring_parser.parse_from_object(one).params
    }
    hints = get_type_hints(made, include_extras=True)
    parameters = inspect.signature(made).parameters
    fields = tuple(
        StructFieldSpec(
            name,
            _shown(hints[name], parameter.default),
            MISSING if parameter.default is parameter.empty else parameter.default,
            helptext=texts.get(name),
        )
        for name, parameter in parameters.items()
    )
    return StructConstructorSpec(_by_name(made), fields)


def _title(group: type) -> str:
    """SpecialTokenOptions: special token. tyro adds the word options."""
    words = re.findall("[A-Z][a-z]*", group.__name__.removesuffix("Options"))
    return " ".join(words).lower()


def _group(group: type) -> Any:
    return Annotated[group, arg(name=_title(group))]


def _shown(hint: Any, default: object) -> Any:
    """The type with what tyro needs to know; a flag that is off by default only turns on."""
    flag = (FlagCreatePairsOff,) if default is False else ()
    return Annotated[(hint, arg(help_behavior_hint=_default), *flag)]


def _default(default: str) -> str:
    """What stands behind the text; where there is no default, the text says what happens."""
    return "" if default in ("None", "False", "") else f"(default: {default})"


def _from_groups(made: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(made)
    def call(**groups: Any) -> Any:
        return made(**{name: x for group in groups.values() for name, x in vars(group).items()})

    return call


def _by_name(made: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes everything by name, also what comes by position on a command line."""
    parameters = inspect.signature(made).parameters.values()
    by_position = [one.name for one in parameters if one.kind is one.POSITIONAL_ONLY]

    @functools.wraps(made)
    def call(**given: Any) -> Any:
        return made(*[given.pop(name) for name in by_position], **given)

    return call
