"""The script for GPT-2 on a GPU, at toy size: both runs, the table, and going on."""

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpt2_at_scale.py"


def test_the_full_scale_script_runs_and_goes_on(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("gpt2_at_scale", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(tmp_path / "out", tiny=True)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    for name in ("original", "vanilla", "lnfree"):
        assert 0 < result[name]["median"] < result[name]["p99.9"] <= result[name]["largest"]
    gap = result["lnfree"]["mean"] - result["vanilla"]["mean"]
    assert f"LN-free minus vanilla: {gap:+.4f}" in capsys.readouterr().out
    weights = tmp_path / "out" / "lnfree" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    script.main(tmp_path / "out", tiny=True)
    assert capsys.readouterr().out.count("is finished") == 2
    assert weights.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
