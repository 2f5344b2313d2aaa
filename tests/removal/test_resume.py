"""Nothing is lost: killed, resumed, damaged, full disk, diverging."""

import errno
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.data.sequences import ShuffledSequences
from lnfree_interp.errors import CheckpointError, OutputError, PausedError, RecipeError
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run_folder import Checkpoint, RunFolder
from lnfree_interp.removal.schedule import published_order, sequential_sites
from lnfree_interp.removal.settings import Special, Statistics
from lnfree_interp.removal.training_state import fingerprint

STEPS, EVERY = 24, 5


@pytest.fixture(scope="module")
def model():
    return live_model("gpt2", torch.float32, n_layer=2)


@pytest.fixture(scope="module")
def data():
    return torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))


def a_recipe(**changes):
    settings = {
        "events": published_order(sequential_sites(2), start=2, ln2_gap=1, qk_gap=2, v_gap=2),
        "steps": STEPS, "batch": 4, "micro_batch": 2, "lr": 1e-3, "warmup": 2, "final_lr": 0.1,
        "distillation": 0.5,
        # Everything that has a state: moving sigmas, shared ones, special tokens, averages, and an
        # unembedding of its own.
        "weight_average": 0.8, "embedding_cap": 0.9, "repeats": 0.2, "random_tokens": 0.3,
        "statistics": Statistics(source="ema", sequences=4, share_ln1=True, tokens="ordinary"),
        "special": Special(first_until=15),
        "evaluate_every": 4,
    }  # fmt: skip
    return Recipe(**(settings | changes))


def noise(x, hook):
    """A hook with a random state of its own."""
    return x + 0.01 * torch.randn_like(x)


def train(
    model, data, out, resume=False, recipe=None, hook=noise, heldout=None, every=None, **more
):
    torch.manual_seed(11)
    return lf.remove_norms(
        model,
        a_recipe() if recipe is None else recipe,
        data,
        heldout=data[:6] if heldout is None else heldout,
        out=out,
        resume=resume,
        fwd_hooks=[("blocks.0.hook_mlp_out", hook)],
        checkpoint_every=EVERY if every is None else every,
        progress=False,
        **more,
    )


@pytest.fixture(scope="module")
def uninterrupted(model, data, tmp_path_factory):
    return train(model, data, tmp_path_factory.mktemp("run") / "whole")


def without_times(history):
    return [replace(record, seconds=0.0) for record in history]


def test_another_constant_is_another_model(model):
    sites = lf.with_norm_sites(model)
    same = fingerprint(sites)
    assert fingerprint(lf.with_norm_sites(model)) == same
    found = {same}
    for sigma in (2.0, 3.0):
        lf.freeze_site(sites, "ln_final", sigma)
        found.add(fingerprint(sites))
    assert len(found) == 3


class Cut(BaseException):
    """The power goes."""


@pytest.mark.parametrize("at", [3, 11, 25, 40, 47])
def test_a_run_cut_off_anywhere_ends_with_the_same_weights(
    model, data, tmp_path, uninterrupted, at
):
    count = iter(range(10**6))

    def cut(x, hook):
        if torch.is_grad_enabled() and next(count) == at:
            raise Cut
        return noise(x, hook)

    with pytest.raises(Cut):
        train(model, data, tmp_path / "run", hook=cut)
    torch.manual_seed(99)  # another process would not have ours
    resumed = train(model, data, tmp_path / "run", resume=True)
    assert fingerprint(resumed.model) == fingerprint(uninterrupted.model)
    assert without_times(resumed.history) == without_times(uninterrupted.history)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))


def test_a_run_that_pauses_after_every_step_ends_with_the_same_weights(
    model, data, tmp_path, uninterrupted
):
    out = tmp_path / "run"
    for step in range(1, STEPS):
        with pytest.raises(PausedError, match=f"paused at step {step} of {STEPS}"):
            train(model, data, out, resume=step > 1, minutes=0.0)
    run = train(model, data, out, resume=True, minutes=0.0)
    assert fingerprint(run.model) == fingerprint(uninterrupted.model)
    assert without_times(run.history) == without_times(uninterrupted.history)


def test_minutes_need_a_folder_and_may_be_plenty(model, data, uninterrupted, tmp_path):
    with pytest.raises(RecipeError, match="pausing needs the run's folder"):
        train(model, data, None, minutes=1.0)
    run = train(model, data, tmp_path / "run", minutes=1000.0)
    assert fingerprint(run.model) == fingerprint(uninterrupted.model)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {here!r}]
import test_resume as t
import torch
import lnfree_interp as lf
from support.models import make_gpt2
model = lf.load(make_gpt2(n_layer=2), device="cpu")
data = torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))
kill, where = int(sys.argv[2]), sys.argv[3]
if where == "save":  # in the middle of writing a checkpoint
    from lnfree_interp.removal import run_folder
    right, calls = run_folder.safetensors.torch.save_file, []
    def save(*arguments, **more):
        calls.append(1)
        if len(calls) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*arguments, **more)
    run_folder.safetensors.torch.save_file = save
count = iter(range(10**6))
def hook(x, hook):
    if where == "step" and next(count) == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.noise(x, hook)
t.train(model, data, sys.argv[1], hook=hook)
"""


def in_a_process(out, kill, where):
    here = Path(__file__).parent
    script = KILLED.format(tests=str(here.parent), here=str(here))
    command = [sys.executable, "-W", "ignore", "-c", script, str(out), str(kill), where]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("where", "kill"), [("step", 30), ("save", 6)])
def test_killed_by_the_system_and_resumed_bit_by_bit(
    model, data, tmp_path, uninterrupted, where, kill
):
    out = tmp_path / where
    killed = in_a_process(out, kill, where)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    torch.manual_seed(99)
    again = train(model, data, out, resume=True)
    assert fingerprint(again.model) == fingerprint(uninterrupted.model)
    # Nothing half written is left.
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-000020", "step-000024",
    ]  # fmt: skip


def test_the_same_stream_may_be_used_again(model, data, tmp_path, uninterrupted):
    """In a notebook, after Ctrl-C: the stream stands where the run was cut off."""
    count = iter(range(10**6))

    def cut(x, hook):
        if torch.is_grad_enabled() and next(count) == 20:
            raise Cut
        return noise(x, hook)

    stream = ShuffledSequences(data, 0)
    with pytest.raises(Cut):
        train(model, stream, tmp_path / "run", hook=cut, heldout=data[:6])
    resumed = train(model, stream, tmp_path / "run", resume=True, heldout=data[:6])
    assert fingerprint(resumed.model) == fingerprint(uninterrupted.model)


def test_resuming_a_finished_run_changes_nothing(model, data, tmp_path):
    run = train(model, data, tmp_path / "run")
    again = train(model, data, tmp_path / "run", resume=True)
    assert fingerprint(again.model) == fingerprint(run.model)
    assert again.history == run.history


def test_only_the_same_run_is_resumed(model, data, tmp_path):
    train(model, data, tmp_path / "run")
    with pytest.raises(RecipeError, match="another recipe"):
        train(model, data, tmp_path / "run", resume=True, recipe=a_recipe(lr=2e-3))
    with pytest.raises(RecipeError, match="another data"):
        train(model, data.flip(0), tmp_path / "run", resume=True)
    other = live_model("gpt2", torch.float32, seed=1, n_layer=2)
    with pytest.raises(RecipeError, match="another model"):
        train(other, data, tmp_path / "run", resume=True)
    with pytest.raises(OutputError, match="already exists"):
        train(model, data, tmp_path / "run")
    with pytest.raises(CheckpointError, match="it is not a run"):
        train(model, data, tmp_path / "elsewhere", resume=True)
    with pytest.raises(RecipeError, match="give out="):
        train(model, data, None, resume=True)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(
    model, data, tmp_path, uninterrupted, file, damage
):
    out = tmp_path / "run"
    train(model, data, out)
    checkpoints = RunFolder(out).checkpoints
    assert list(checkpoints) == [20, 24]
    broken = checkpoints[24] / file
    content = bytearray(broken.read_bytes())
    if damage == "gone":
        broken.unlink()
    else:
        content = content[:-9] if damage == "cut" else content
        content[len(content) // 2] ^= 1
        broken.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"000024.*damaged.*step-000020 is intact: remove"):
        train(model, data, out, resume=True)
    for path in checkpoints[24].iterdir():
        path.unlink()
    checkpoints[24].rmdir()
    resumed = train(model, data, out, resume=True)
    assert fingerprint(resumed.model) == fingerprint(uninterrupted.model)


def test_with_nothing_whole_left_it_says_so(model, data, tmp_path):
    out = tmp_path / "run"
    train(model, data, out)
    for path in RunFolder(out).checkpoints.values():
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        train(model, data, out, resume=True)


@pytest.mark.parametrize("type_of_error", ["os", "safetensors"])
def test_a_full_disk_leaves_the_checkpoint_before(
    model, data, tmp_path, monkeypatch, type_of_error
):
    out, right, calls = tmp_path / "run", safetensors.torch.save_file, []

    def full(tensors, file, **more):
        calls.append(file)
        if len(calls) < 6:
            return right(tensors, file, **more)
        Path(file).write_bytes(b"half")
        if type_of_error == "os":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        OutputError, match=r"step 10 could not be written.*step-000005 is intact: free"
    ):
        train(model, data, out)
    monkeypatch.undo()
    assert list(RunFolder(out).checkpoints) == [0, 5]
    assert train(model, data, out, resume=True).history[-1].step == STEPS - 1


def test_metrics_that_were_tampered_with_are_refused(model, data, tmp_path):
    out = tmp_path / "run"
    train(model, data, out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:7] + lines[9:]))
    with pytest.raises(CheckpointError, match="it was changed"):
        train(model, data, out, resume=True)


def test_an_existing_empty_folder_is_taken(model, data, tmp_path):
    (tmp_path / "run").mkdir()
    train(model, data, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["steps"] == STEPS


def test_settings_that_are_not_plain_data_are_refused(model, data, tmp_path):
    with pytest.raises(RecipeError, match="plain data"):
        train(model, data, tmp_path / "run", about={"file": tmp_path})
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_keeps_what_it_was_given(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create({"recipe": {}})
    tensors = {"a": torch.randn(3), "b": torch.tensor(math.nan, dtype=torch.float64)}
    for step in (0, 5, 10):
        folder.save(Checkpoint(step, tensors, {}, {"x": [1, None, "é"]}))
    assert list(folder.checkpoints) == [5, 10]
    back = folder.latest()
    assert back.step == 10
    assert back.state == {"x": [1, None, "é"]}
    assert torch.equal(back.model["a"], tensors["a"])
    assert back.model["b"].isnan()
