"""Which functions jaxtyping and beartype check while the tests run: all but those in functions.

jaxtyping's import hook decorates a function inside a function too, and so again in every call of
the outer one: that was most of the time that the tests took.
"""

import ast

from beartype import beartype
from jaxtyping._import_hook import JaxtypingTransformer

__all__ = ["beartype", "leave_inner_functions"]

_decorated = JaxtypingTransformer.visit_FunctionDef


def _visit(self: JaxtypingTransformer, node: ast.FunctionDef) -> ast.FunctionDef:
    if any(isinstance(parent, ast.FunctionDef) for parent in self._parents):
        return node
    return _decorated(self, node)


def leave_inner_functions() -> None:
    """Of what is imported from now on."""
    JaxtypingTransformer.visit_FunctionDef = _visit
