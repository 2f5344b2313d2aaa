"""`lnfree remove`, end to end: GPT-2, GPT-NeoX and Llama, from files, resumed, and refused."""

import json
import re
import shutil

import pytest
import torch
from support.architectures import make_model
from support.commands import lnfree
from support.loaded import live_model
from transformers import AutoModelForCausalLM

import lnfree_interp as lf
from lnfree_interp.data.sources import open_sequences
from lnfree_interp.errors import DataError, RecipeError
from lnfree_interp.removal import run_job
from lnfree_interp.removal.job import RemovalJob
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run_folder import RunFolder
from lnfree_interp.removal.run_job import make_recipe
from lnfree_interp.removal.sensitivity import SiteSensitivity
from lnfree_interp.removal.settings import Special, Statistics


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rows = [{"text": f"def f{i}(x):\n    return x + {i}\n" * 6} for i in range(60)]
    file = folder / "code.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(params=["gpt2", "neox", "llama-grouped"])
def folder(request, tmp_path, tokenizer):
    """A checkpoint in the real format, of an architecture whose norms are LN or RMSNorm, whose
    blocks are sequential or parallel."""
    model = make_model(request.param)
    with torch.no_grad():  # tokens whose norms differ as little as in a trained model
        for W in model.parameters():
            W *= 0.5
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


QUICK = ("--steps", 14, "--batch", 4, "--sequence-length", 32, "--lr", "1e-4", "--heldout", 4,
         "--evaluate-every", 5, "--checkpoint-every", 6)  # fmt: skip
DISTILLED = ("--recipe", "distilled")


def test_from_a_folder_and_a_file_to_an_lnfree_model(monkeypatch, tmp_path, folder, text, capsys):
    out = tmp_path / "run"
    lnfree(monkeypatch, "remove", folder, "--out", out, "--data", text, *QUICK)
    printed = capsys.readouterr().out
    assert "all gone at step" in printed
    assert "largest logit difference from transformers" in printed
    assert f"wrote {out}/model" in printed
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(14))
    assert sum(len(record["frozen"]) for record in records) == 10
    assert [r["step"] for r in records if r["heldout"] is not None] == [4, 9, 13]
    probes = records[10]["probes"]
    assert len(probes["resid_norm_max"]) == 3
    assert probes["drift"]
    assert probes["largest_activation"] > 0
    # What was written is LN-free, for us and for plain transformers, and they agree.
    free = lf.load(out / "model")
    assert free.cfg.normalization_type is None
    hf = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    lf.compare_logits(free, hf).require("exported", 1e-4)
    heldout = lf.evaluate_loss(free, _heldout(free, text)).mean
    assert heldout == pytest.approx(records[-1]["heldout"], rel=2e-3)  # bfloat16 while training
    sidecar = lf.formats.read_sidecar(out / "model")
    assert sidecar.recipe["steps"] == 14
    assert sidecar.source == "source"


def _heldout(model, text):
    return open_sequences(text, model.tokenizer, 32).take(4)


@pytest.mark.parametrize("folder", ["llama-grouped"], indirect=True)
def test_a_command_that_was_cut_off_goes_on(monkeypatch, tmp_path, folder, text, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lnfree(monkeypatch, "remove", folder, "--out", whole, "--data", text, *QUICK)
    right = RunFolder.save

    def interrupted(self, checkpoint, **more):
        right(self, checkpoint, **more)
        if checkpoint.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", interrupted)
        with pytest.raises(SystemExit) as stopped:
            lnfree(patch, "remove", folder, "--out", cut, "--data", text, *QUICK)
        assert stopped.value.code == 130
    assert "--resume" in capsys.readouterr().err
    lnfree(monkeypatch, "remove", "--resume", cut)
    files = ("model.safetensors", "config.json")
    for name in files:
        assert (cut / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    with pytest.raises(SystemExit):
        lnfree(monkeypatch, "remove", "--resume", cut)
    assert "this run is finished" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["neox"], indirect=True)
def test_a_command_that_pauses_says_so_and_goes_on(monkeypatch, tmp_path, folder, text, capsys):
    whole, short = tmp_path / "whole", tmp_path / "short"
    lnfree(monkeypatch, "remove", folder, "--out", whole, "--data", text, *QUICK)
    first = ("remove", folder, "--out", short, "--data", text, "--minutes", 0, *QUICK)
    again = ("remove", "--resume", short, "--minutes", 0)
    for step, arguments in enumerate((first, again), start=1):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            lnfree(monkeypatch, *arguments)
        assert stopped.value.code == 75
        assert f"paused at step {step} of 14; `lnfree remove --resume" in capsys.readouterr().out
    lnfree(monkeypatch, "remove", "--resume", short)
    one, other = (run / "model" / "model.safetensors" for run in (whole, short))
    assert one.read_bytes() == other.read_bytes()


def test_the_control_is_written_with_its_norms(monkeypatch, tmp_path, folder, text):
    out = tmp_path / "run"
    lnfree(monkeypatch, "remove", folder, "--out", out, "--data", text, "--vanilla", *QUICK)
    assert lf.formats.read_sidecar(out / "model").form == "live"
    control = lf.load(out / "model")
    assert lf.live_sites(control) == lf.list_norm_sites(control)
    assert lf.compare_logits(control, lf.load(folder)).relative > 1e-3  # it was trained


def test_a_plan_trains_nothing(monkeypatch, tmp_path, gpt2_folder, text, capsys):
    out = tmp_path / "run"
    lnfree(
        monkeypatch, "remove", gpt2_folder, "--out", out, "--plan", "--recipe", "taper",
        "--data", text, "--batch", 6, "--micro-batch", 3,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "recipe: taper" in printed
    assert "each fading over" in printed
    assert f"{text}, 60 documents" in printed
    assert "250 of 6 sequences x 48 tokens: 288 a step, 72,000 in all" in printed
    assert re.search(r"time +about [\d.]+ \w+ for 250 steps", printed)
    assert "3 micro-batches of 3 x 48 random tokens" in printed
    assert "without distillation" in printed
    weights, gradients, adamw = re.search(
        r"weights ([\d.]+) kB \+ gradients ([\d.]+) kB \+ AdamW ([\d.]+) kB", printed
    ).groups()
    assert weights == gradients
    assert float(adamw) == pytest.approx(2 * float(weights), rel=0.01)
    assert "activations of 3 sequences" in printed
    assert "peak" in printed
    assert "nothing was trained" in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "destiled"), "no recipe 'destiled'; the nearest is distilled. The recipes"),
        (("--recipe", "gpt2-small"), "it freezes 37 norm sites, and this model has 10"),
        (("--patience", "0"), "patience must be positive"),
        (
            ("--steps", "7"),
            "recipe measured: 7 steps are too few to let norms go one by one: give at",
        ),
        ((*DISTILLED, "--steps", "3"), "distilled: 3 steps are too few for 10 norm sites: give at"),
        ((*DISTILLED, "--steps", "9", "--start", "4"), "10 norm sites: give at least 14 steps"),
        (("--recipe", "taper", "--steps", "9"), "too few for a taper: give at least 10 steps"),
        (("--kinds", "attn.q_norm"), "no norm site of the kind attn.q_norm; it has ln1.qk"),
        (("--keep", "blocks.*.ln3"), "no norm site is called 'blocks.*.ln3'; there are ln1.qk in"),
        (("--keep", "*"), "kinds and keep leave no norm site to remove"),
        (("--gap", "-1"), "start=None, gap=-1 and taper=None are numbers of steps"),
        (("--sigma-momentum", "1"), "momentum must lie in 0..1"),
        (("--data", "./nothing.jsonl"), "nothing.jsonl: no such file or folder"),
        (("--column", "body"), "no column 'body'"),
        (("--sequence-length", "4096"), "the model's context is 48"),
        (("--sequence-length", "1"), "a sequence of one token has no next token"),
        (("--distillation", "2"), "distillation must lie in 0..1"),
    ],
)
@pytest.mark.parametrize("plan", [(), ("--plan",)], ids=["run", "plan"])
def test_wrong_input_is_refused_by_name_before_the_weights_are_loaded(
    monkeypatch, tmp_path, gpt2_folder, text, capsys, arguments, message, plan
):
    folder = tmp_path / "no-weights"
    shutil.copytree(gpt2_folder, folder)
    (folder / "model.safetensors").unlink()
    assert message in refused(monkeypatch, tmp_path, folder, text, capsys, *arguments, *plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--track", "tensorboard"), "tensorboard is not installed"),
        (("--checkpoint-every", "0"), "checkpoint_every is 0"),
    ],
)
def test_wrong_input_is_refused_before_the_run(
    monkeypatch, tmp_path, gpt2_folder, text, capsys, arguments, message
):
    monkeypatch.setattr("lnfree_interp.removal.tracking.find_spec", lambda name: None)
    assert message in refused(monkeypatch, tmp_path, gpt2_folder, text, capsys, *arguments)


def refused(monkeypatch, tmp_path, folder, text, capsys, *arguments):
    """What the command says, in one line, when it refuses."""
    settings = [] if arguments[0] == "--data" else ["--data", text]
    settings += [] if arguments[0] == "--sequence-length" else ["--sequence-length", 32]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        lnfree(monkeypatch, "remove", folder, "--out", out, *settings, *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not out.exists()
    return error


def test_only_the_bundled_model_has_a_text_by_default(monkeypatch, gpt2_folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        lnfree(monkeypatch, "remove", gpt2_folder, "--plan")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"no text was named for {gpt2_folder}" in error
    for accepted in ("--data", "stdlib", ".jsonl", "save_to_disk", "data set on the hub"):
        assert accepted in error
    with pytest.raises(DataError, match=r"no text was named for gpt2\..*data= in Python"):
        RemovalJob(model="gpt2")
    assert RemovalJob(model="gpt2", data="stdlib").text == "stdlib"
    for model in (None, str(lf.bundled_checkpoint()), f"{lf.bundled_checkpoint()}/"):
        assert RemovalJob(model=model).text == "stdlib"


def test_settings_of_the_recipe_on_the_command_line(monkeypatch, tmp_path, gpt2_folder, text):
    out = tmp_path / "run"
    lnfree(
        monkeypatch, "remove", gpt2_folder, "--out", out, "--data", text, *QUICK, *DISTILLED,
        "--start", 2, "--gap", 0, "--taper", 5, "--sigma-source", "ema", "--sigma-average", "rms",
        "--sigma-tokens", "ordinary", "--sigma-share-ln1", "--special-first-until", 9,
        "--special-end-of-text-until", 8, "--special-end-of-text-kinds", "ln1.v", "ln2",
    )  # fmt: skip
    recipe = Recipe.from_json(json.loads((out / "run.json").read_text())["recipe"])
    assert {(event.step, event.over) for event in recipe.events} == {(2, 5)}
    assert recipe.statistics == Statistics(
        source="ema", average="rms", tokens="ordinary", share_ln1=True
    )
    assert recipe.special == Special(
        first_until=9, end_of_text_until=8, end_of_text_kinds=("ln1.v", "ln2")
    )
    about = json.loads((out / "run.json").read_text())["about"]
    assert about["data"] == str(text)


def test_some_kinds_of_norms_go_and_the_others_stay(monkeypatch, tmp_path, gpt2_folder, text):
    out = tmp_path / "run"
    lnfree(
        monkeypatch, "remove", gpt2_folder, "--out", out, "--data", text, *QUICK,
        "--kinds", "ln1.v", "ln_final",
    )  # fmt: skip
    model = lf.load(out / "model", form="sites")
    assert {site.kind for site in lf.live_sites(model)} == {"ln1.qk", "ln2"}
    assert len(lf.list_norm_sites(model)) - len(lf.live_sites(model)) == 4


def test_sites_that_are_kept_by_name_or_pattern_stay_live(monkeypatch, tmp_path, gpt2_folder, text):
    out = tmp_path / "run"
    lnfree(
        monkeypatch, "remove", gpt2_folder, "--out", out, "--data", text, *QUICK,
        "--kinds", "ln1.v", "ln2", "--keep", "blocks.*.ln1.v", "blocks.1.ln2",
    )  # fmt: skip
    sites = lf.load(out / "model", form="sites")
    gone = set(lf.list_norm_sites(sites)) - set(lf.live_sites(sites))
    assert {site.kind for site in gone} == {"ln2"}
    assert 1 not in {site.layer for site in gone}


@pytest.mark.parametrize("first_matters", [False, True])
def test_a_control_has_the_text_and_the_rates_of_the_removal_that_was_measured(
    monkeypatch, tmp_path, gpt2_folder, text, first_matters
):
    """Sequences begin with the beginning of text if first tokens matter, or if told to."""
    seen = {}

    def remove(model, recipe, data, **more):
        key = (bool(recipe.events), more["about"]["prepend_bos"])
        seen[key] = (recipe.lr, recipe.final_lr, data.take(3))
        raise RecipeError("enough")

    monkeypatch.setattr(run_job, "remove_norms", remove)
    monkeypatch.setattr(SiteSensitivity, "first_matters", first_matters)
    for arguments in ((), ("--vanilla",), ("--prepend-bos",), ("--vanilla", "--prepend-bos")):
        with pytest.raises(SystemExit):
            lnfree(
                monkeypatch, "remove", gpt2_folder, "--out", tmp_path / "run", "--data", text,
                *QUICK[:6], *arguments,
            )  # fmt: skip
    bos = {False, True} if not first_matters else {True}
    assert set(seen) == {(removes, begun) for removes in (True, False) for begun in bos}
    for begun in bos:
        (lr, final_lr, tokens), (other_lr, other_final, others) = (
            seen[removes, begun] for removes in (True, False)
        )
        assert (lr, final_lr) == (other_lr, other_final) == (1e-4 if first_matters else 3e-4, 0.1)
        assert torch.equal(tokens, others)
        assert (len(set(tokens[:, 0].tolist())) == 1) is begun


def test_a_plan_is_not_a_resumption(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        lnfree(monkeypatch, "remove", "--resume", tmp_path, "--plan")
    assert stopped.value.code == 2
    assert "--plan is about a run that has not begun" in capsys.readouterr().err


def test_resuming_what_is_no_run(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        lnfree(monkeypatch, "remove", "--resume", tmp_path)
    assert stopped.value.code == 2
    assert "it is not a run" in capsys.readouterr().err


def test_a_run_of_the_library_is_not_resumed_by_the_command(monkeypatch, tmp_path, capsys):
    model = live_model("gpt2", torch.float32, n_layer=2)
    data = torch.randint(300, (16, 24))
    recipe = make_recipe(RemovalJob(steps=8, vanilla=True, batch=4), model)
    lf.remove_norms(model, recipe, data, out=tmp_path / "run", progress=False)
    with pytest.raises(SystemExit):
        lnfree(monkeypatch, "remove", "--resume", tmp_path / "run")
    assert "not started on the command line" in capsys.readouterr().err


def test_wandb_itself_takes_the_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    model = live_model("gpt2", torch.float32, n_layer=2)
    recipe = make_recipe(RemovalJob(steps=8, batch=4), model)
    data = torch.randint(300, (16, 24))
    lf.remove_norms(model, recipe, data, out=tmp_path / "run", progress=False, trackers=["wandb"])
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_tensorboard_gets_the_numbers(monkeypatch, tmp_path):
    """Through Accelerate's tracker; the package itself is not needed for that."""
    seen = {}

    class Tracker:
        def __init__(self, name, logging_dir):
            seen["folder"] = logging_dir

        def start(self):
            seen["started"] = True

        def log(self, values, step):
            assert seen["started"]
            seen[step] = values

        def finish(self):
            seen["finished"] = True

    monkeypatch.setattr("lnfree_interp.removal.tracking.TensorBoardTracker", Tracker)
    monkeypatch.setattr("lnfree_interp.removal.tracking.find_spec", lambda name: object())
    model = live_model("gpt2", torch.float32, n_layer=2)
    recipe = make_recipe(RemovalJob(recipe="distilled", steps=12, batch=4), model)
    data = torch.randint(300, (16, 24))
    lf.remove_norms(model, recipe, data, progress=False, trackers=["tensorboard"], log_every=4)
    assert seen["finished"]
    assert seen[3]["loss"] > 0
    assert any(name.startswith("sigma/") for name in seen[5])
    assert "resid_norm_max/1" in seen[8]
    assert "drift/ln_final" in seen[8] or "drift/blocks.0.ln2" in seen[8]
