"""Two processes are one: same text, same losses, same sigmas, same weights on both."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "two_processes.py"


def run(out, processes, *arguments):
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {
        "PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true", "HOME": str(out.parent),
        "PYTHONPATH": f"{SCRIPT.parents[1]}:{SCRIPT.parents[2]}",
    }  # fmt: skip
    return subprocess.run(
        [*command, str(SCRIPT), str(out), *arguments],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


def start(out, processes, *arguments):
    ran = run(out, processes, *arguments)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ranks = range(processes)
    return [json.loads(out.with_name(f"{out.name}-{rank}.json").read_text()) for rank in ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(folder):
    return start(folder / "one", 1)[0]


@pytest.fixture(scope="module")
def two(folder):
    return start(folder / "two", 2)


def test_two_processes_train_as_one(one, two):
    for report in two:
        for what in ("losses", "gradients", "distillation", "heldout"):
            assert report[what] == pytest.approx(one[what], rel=2e-5), what
        assert report["sigma"] == pytest.approx(one["sigma"], rel=2e-5)
        for ours, theirs in zip(report["drift"], one["drift"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)
    assert len(one["sigma"]) == 7
    assert two[0]["weights"] == two[1]["weights"]
    # Each process did half of the work.
    assert two[0]["forwards"] == two[1]["forwards"] == pytest.approx(one["forwards"] / 2, abs=2)


def test_spread_weights_train_as_whole_ones(one, folder):
    """FSDP 2, by torch itself on two gloo processes: events, checkpoints, resumption."""
    spread = start(folder / "spread", 2, "fsdp")
    for report in spread:
        for what in ("losses", "gradients", "distillation", "heldout"):
            assert report[what] == pytest.approx(one[what], rel=2e-5), what
        assert report["sigma"] == pytest.approx(one["sigma"], rel=2e-5)
    assert spread[0]["weights"] == spread[1]["weights"]
    shutil.rmtree(folder / "spread" / "checkpoints" / "step-000012")
    resumed = start(folder / "spread", 2, "fsdp", "resume")
    assert resumed[0]["weights"] == spread[0]["weights"]


def test_a_run_goes_on_with_as_many_processes(two, folder):
    shutil.copytree(folder / "two", folder / "fewer")
    ran = run(folder / "fewer", 1, "resume")
    assert ran.returncode != 0
    assert "the run had 2 processes, now there are 1" in ran.stderr


def test_one_writes_for_both_and_the_run_can_go_on(two, folder):
    out = folder / "two"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 12
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step-000010", "step-000012",
    ]  # fmt: skip
    shutil.rmtree(out / "checkpoints" / "step-000012")
    resumed = start(out, 2, "resume")
    assert resumed[0]["weights"] == resumed[1]["weights"] == two[0]["weights"]
    assert resumed[0]["losses"] == two[0]["losses"]


def test_what_is_not_trained_is_the_same_in_both(folder):
    one = start(folder / "part-one", 1, "part")[0]
    two = start(folder / "part-two", 2, "part")
    assert one["moved"] == two[0]["moved"] == two[1]["moved"] == []
    assert two[0]["weights"] == two[1]["weights"]
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=2e-5)
    shutil.rmtree(folder / "part-two" / "checkpoints" / "step-000012")
    resumed = start(folder / "part-two", 2, "part", "resume")
    assert resumed[0]["weights"] == two[0]["weights"]
    spread = run(folder / "part-spread", 2, "part", "fsdp")
    assert spread.returncode != 0
    assert "FSDP spreads whole parameters" in spread.stderr


def test_integers_are_those_of_each_process(folder):
    """Each draws its own rounding, so that two are not one; both have the same weights."""
    two = start(folder / "int8", 2, "int8")
    assert two[0]["weights"] == two[1]["weights"]
    shutil.rmtree(folder / "int8" / "checkpoints" / "step-000012")
    resumed = start(folder / "int8", 2, "int8", "resume")
    assert resumed[0]["weights"] == two[0]["weights"]
    spread = run(folder / "int8-spread", 2, "int8", "fsdp")
    assert spread.returncode != 0
    assert "precision='int8': FSDP spreads the weights" in spread.stderr
