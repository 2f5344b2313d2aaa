"""`python -m lnfree_interp.cli` is `lnfree` too."""

from lnfree_interp.cli import main

main()
