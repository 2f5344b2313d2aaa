"""`python -m lnfree_interp` is `lnfree`."""

from lnfree_interp.cli import main

main()
