"""What benchmarks over several seeds share: finished runs in a file, and means with deviations."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """A file of finished runs, a line each, which are not run again."""

    def __init__(self, file: Path):
        self.file = file
        self.done: list[Row] = []
        if file.exists():
            self.done = [json.loads(line) for line in file.read_text().splitlines()]

    def get(self, about: Row, run: Callable[[], Row]) -> Row:
        """The row of a run, which is made if there is none.

        Args:
            about: What tells it from others.
            run: Makes what else the row says.
        """
        for row in self.done:
            if about.items() <= row.items():
                return row
        row = about | run()
        self.done.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """The mean over seeds, and their standard deviation."""
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{more}"
