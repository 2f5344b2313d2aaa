"""The command line: `lnfree demo`, `remove`, `freeze`, `sample`, `convert`, `evaluate`,
`report`.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

import os
import sys
from importlib.metadata import version

import tyro

from lnfree_interp.cli.convert import convert
from lnfree_interp.cli.demo import demo
from lnfree_interp.cli.evaluate import evaluate
from lnfree_interp.cli.freeze import freeze
from lnfree_interp.cli.options import CONFIG, REGISTRY
from lnfree_interp.cli.remove import remove
from lnfree_interp.cli.report import report
from lnfree_interp.cli.sample import sample
from lnfree_interp.errors import LnfreeError, PausedError


def main() -> None:
    """Run a command. Exit status: 2 for an error that the user can correct, 75 for a run
    that paused after its `--minutes`, 130 after Ctrl-C."""
    if sys.argv[1:] == ["--version"]:
        print(f"lnfree {version('lnfree_interp')}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "demo": demo,
                "remove": remove,
                "freeze": freeze,
                "sample": sample,
                "convert": convert,
                "evaluate": evaluate,
                "report": report,
            },
            prog="lnfree",
            description=(
                "Remove the norms of a transformer, and read its logits as sums of parts. "
                "`lnfree --version` says which version this is."
            ),
            config=CONFIG,
            registry=REGISTRY,
        )
    except PausedError as error:
        print(f"lnfree: {error}")
        sys.exit(75)
    except LnfreeError as error:
        print(f"lnfree: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        continued = {
            "remove": "lnfree remove --resume RUN continues a run that had begun",
            "freeze": "with --steps, the same command with --resume continues what had begun",
            "sample": "the same command continues it",
        }
        left = continued.get("".join(sys.argv[1:2]), "nothing was written")
        print(f"\nlnfree: interrupted; {left}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
