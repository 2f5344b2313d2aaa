"""The memory of this process, for the benchmarks. Linux only."""

from pathlib import Path


def resident(field: str) -> float:
    """A field of this process's status, such as `VmRSS` or `VmHWM`, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise KeyError(field)


def forget_peak() -> None:
    """Let the peak, `VmHWM`, start again from here."""
    Path("/proc/self/clear_refs").write_text("5")
