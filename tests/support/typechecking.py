"""How jaxtyping and beartype check the package while the tests run: as much, in a fraction of time.

jaxtyping's import hook binds the arguments of every call and checks them twice, once more with what
comes back, for a better message. Here beartype checks them once, and sizes of arrays have to agree
within a call where there are arrays. A function inside a function is left alone: it would be
decorated again in every call of the outer one.
"""

import ast
import inspect
from dataclasses import is_dataclass
from functools import wraps
from typing import Any, Literal, get_args, get_origin

import jaxtyping
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation as TypeCheckError
from jaxtyping import AbstractArray, jaxtyped
from jaxtyping._import_hook import JaxtypingTransformer

__all__ = ["TypeCheckError", "beartype", "speed_up"]

_decorated = JaxtypingTransformer.visit_FunctionDef


def _visit(self: JaxtypingTransformer, node: ast.FunctionDef) -> ast.FunctionDef:
    if any(isinstance(parent, ast.FunctionDef) for parent in self._parents):
        return node
    return _decorated(self, node)


def _has_arrays(annotation: Any) -> bool:
    if isinstance(annotation, str):  # in quotes
        return "Tensor" in annotation
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    if get_origin(annotation) is Literal:
        return False
    inner = annotation if isinstance(annotation, list | tuple) else get_args(annotation)
    return any(map(_has_arrays, inner))


def _checked(what: Any = None, **_: Any) -> Any:
    """What the import hook decorates every function and class with, in place of `jaxtyped`."""
    if what is None:
        return _checked
    if inspect.isclass(what):
        if is_dataclass(what) and "__init__" in vars(what):
            what.__init__ = _checked(what.__init__)
        return what
    checked = beartype(what)
    if not any(map(_has_arrays, what.__annotations__.values())):
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
