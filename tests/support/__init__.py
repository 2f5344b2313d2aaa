"""What the tests share."""

from support import typechecking

typechecking.speed_up()
