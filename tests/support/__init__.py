"""What the tests share."""

from support import typechecking

typechecking.leave_inner_functions()
