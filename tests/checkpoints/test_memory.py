"""Loading holds no more than 2.5 times the float32 size of a checkpoint."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_loading_a_gpt2_small(tmp_path, monkeypatch):
    """The benchmark has every format; here the ordinary one and the hungriest."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import loading_memory

    size = loading_memory.write_checkpoints(tmp_path, ("live", "lora"))
    for kind in ("live", "lora"):
        assert loading_memory.in_own_process(str(tmp_path / kind), {})["peak"] <= 2.5 * size, kind
