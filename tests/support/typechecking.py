"""How jaxtyping and beartype check the package while the tests run: as much, in a fraction of time.

jaxtyping's import hook binds the arguments of every call and checks them twice, once more with what
comes back, for a better message. Here beartype checks them once, and sizes of arrays have to agree
within a call where there are arrays. A function inside a function is left alone: it would be
decorated again in every call of the outer one.
"""

import ast
import builtins
import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import wraps
from typing import Any, ForwardRef, Literal, get_args, get_origin

import jaxtyping
from beartype import BeartypeConf
from beartype import beartype as beartype_by
from beartype.roar import BeartypeCallHintViolation as TypeCheckError
from jaxtyping import AbstractArray, jaxtyped
from jaxtyping._import_hook import JaxtypingTransformer

__all__ = ["TypeCheckError", "beartype", "speed_up"]

beartype = beartype_by(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
_decorated = JaxtypingTransformer.visit_FunctionDef


def _visit(self: JaxtypingTransformer, node: ast.FunctionDef) -> ast.FunctionDef:
    if any(isinstance(parent, ast.FunctionDef) for parent in self._parents):
        return node
    return _decorated(self, node)


def _within(annotation: Any) -> Iterator[Any]:
    """An annotation, and those that it is made of; what stands in quotes is a string."""
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    yield annotation
    if get_origin(annotation) is not Literal:
        inner = annotation if isinstance(annotation, list | tuple) else get_args(annotation)
        for one in inner:
            yield from _within(one)


def _knows(what: Callable[..., Any], quoted: str) -> bool:
    """Whether names in quotes have a meaning when the program runs, or only to a type checker."""
    known = {*what.__globals__, *vars(builtins), *what.__qualname__.split(".")}
    return all(
        node.id in known for node in ast.walk(ast.parse(quoted)) if isinstance(node, ast.Name)
    )


def _checked(what: Any = None, **_: Any) -> Any:
    """What the import hook decorates every function and class with, in place of `jaxtyped`."""
    if what is None:
        return _checked
    if inspect.isclass(what):
        if is_dataclass(what) and "__init__" in vars(what):
            what.__init__ = _checked(what.__init__)
        return what
    parts = [part for whole in what.__annotations__.values() for part in _within(whole)]
    quoted = [part for part in parts if isinstance(part, str)]
    arrays = any("Tensor" in part for part in quoted) or any(
        inspect.isclass(part) and issubclass(part, AbstractArray) for part in parts
    )
    # Of a generator beartype checks the arguments at the first item, in another call's context.
    late = arrays and inspect.isgeneratorfunction(what)
    if late or not all(_knows(what, part) for part in quoted):
        return jaxtyped(what, typechecker=beartype)
    checked = beartype(what)
    if not arrays:
        return checked

    @wraps(what)
    def with_sizes_of_its_own(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return checked(*args, **kwargs)

    return with_sizes_of_its_own


def speed_up() -> None:
    """For what is imported from now on."""
    JaxtypingTransformer.visit_FunctionDef = _visit
    jaxtyping.jaxtyped = _checked
