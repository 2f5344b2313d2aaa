"""How long the command line takes to answer `--help`.

    python benchmarks/command_line.py [--repeats 5]

Each command is started several times in a process of its own, and the fastest one counts.
"""

import platform
import subprocess
import sys
import time

import tyro

COMMANDS = ("", "demo", "remove", "convert", "evaluate", "report")


def main(repeats: int = 5) -> None:
    """Run the benchmark.

    Args:
        repeats: How often each command is started.
    """
    print("| command | seconds |\n|---|---|")
    for command in COMMANDS:
        words = [*([command] if command else []), "--help"]
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "lnfree_interp", *words], check=True, capture_output=True
            )
            seconds.append(time.perf_counter() - began)
        print(f"| lnfree {' '.join(words)} | {min(seconds):.2f} |", flush=True)
    print(f"fastest of {repeats}; Python {platform.python_version()}, {platform.machine()}")


if __name__ == "__main__":
    tyro.cli(main)
