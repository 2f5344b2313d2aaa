"""What the commands that train do with freed memory."""

import platform
import subprocess
import sys

import pytest

FREED = """
import mmap, sys
from lnfree_interp.cli.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE
before = resident()
block = bytearray(b"1") * 2**28
del block
print((resident() - before) / 2**28)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to")
@pytest.mark.parametrize(("asked", "kept"), [("keep", 1.0), ("not", 0.0)])
def test_freed_memory_is_kept_where_it_is_asked_for(asked, kept):
    command = [sys.executable, "-c", FREED, asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(kept, abs=0.1)
