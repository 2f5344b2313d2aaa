"""How a command's process asks the system for memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of giving it back.

    Each step of training takes and frees gigabytes in large blocks. glibc gives each block back at
    once, and the system clears the pages of the next one, which took a fifth of a step of
    SmolLM2 (docs/benchmarks.md). Without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
