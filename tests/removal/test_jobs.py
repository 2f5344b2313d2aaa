"""From a job to a recipe: settings that are replaced, and steps that are too few."""

import json
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from support.loaded import live_model
from support.models import make_gpt2

import lnfree_interp as lf
from lnfree_interp.checkpoints.loading import config_of
from lnfree_interp.errors import (
    CheckpointError,
    DataError,
    NormSiteError,
    OutputError,
    PausedError,
    RecipeError,
    TooFewStepsError,
)
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.models.sites import sites_of
from lnfree_interp.removal import run_job as run_job_module
from lnfree_interp.removal.job import RemovalJob
from lnfree_interp.removal.named_models import find_model
from lnfree_interp.removal.recipes import BY_NAME
from lnfree_interp.removal.run_job import make_recipe, run_job
from lnfree_interp.removal.schedule import Event, Ramp, last_step, moved, sequential_sites
from lnfree_interp.removal.settings import Special
from lnfree_interp.removal.trial import Trial, distils_at, try_steps

SITES = sequential_sites(4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recipe": "published-style"},
        {"recipe": "taper"},
        {"recipe": "at-once"},
        {"start": 40},
        {"start": 3, "taper": 20},
        {"recipe": "taper", "gap": 4},
        {"recipe": "at-once", "gap": 2, "special_first_until": 60},
        {"special_end_of_text_until": 90},
        {"vanilla": True},
    ],
    ids=str,
)
def test_the_smallest_number_of_steps_is_the_smallest_that_works(settings):
    job = RemovalJob(steps=1, **settings)

    def works(steps):
        try:
            make_recipe(replace(job, steps=steps), SITES)
        except RecipeError:
            return False
        return True

    smallest = next(steps for steps in count(1) if works(steps))
    if smallest == 1:
        assert settings["recipe"] == "at-once"
        return
    for steps in {1, smallest - 1}:
        with pytest.raises(
            TooFewStepsError, match=rf"recipe .* at least {smallest} steps"
        ) as found:
            make_recipe(replace(job, steps=steps), SITES)
        assert found.value.smallest == smallest


@pytest.mark.parametrize(
    ("name", "layers", "smallest"),
    [("gpt2-small", 12, 105), ("gpt2-xl", 48, 723), ("gpt2-small-2024", 12, 1161)],
)
def test_a_published_schedule_does_not_shrink(name, layers, smallest):
    job = RemovalJob(recipe=name)
    sites = sequential_sites(layers)
    for steps in (5, smallest - 1):
        with pytest.raises(TooFewStepsError, match=f"give at least {smallest} steps"):
            make_recipe(replace(job, steps=steps), sites)
    assert make_recipe(replace(job, steps=smallest), sites).steps == smallest
    assert make_recipe(job, sites) == BY_NAME[name]()


def test_a_default_number_of_steps_can_be_too_few():
    with pytest.raises(TooFewStepsError, match="250 steps are too few for 301 norm sites"):
        make_recipe(RemovalJob(recipe="distilled"), sequential_sites(100))


def test_events_move():
    site = [NormSite("ln2", 0), NormSite("ln2", 1), NormSite("ln_final")]
    events = (Event(4, site[0]), Event(6, site[1]), Event(9, site[2]))
    assert moved(events) == events
    assert [e.step for e in moved(events, start=1)] == [1, 3, 6]
    assert [(e.step, e.over) for e in moved(events, gap=5, over=2)] == [(4, 2), (9, 2), (14, 2)]
    # Sites that are frozen together are told apart, in the published order.
    together = moved([replace(event, step=7) for event in reversed(events)], start=0, gap=3)
    assert {event.site: event.step for event in together} == dict(zip(site, (0, 3, 6), strict=True))
    for wrong in ({"start": -1}, {"gap": -1}, {"over": -1}):
        with pytest.raises(RecipeError, match="none may be negative"):
            moved(events, **wrong)


def test_a_recipe_that_freezes_none_of_the_chosen_sites_is_refused():
    sites = (*SITES, NormSite("attn.q_norm", 0))
    job = RemovalJob(recipe="gpt2-small", kinds=("attn.q_norm",))
    with pytest.raises(RecipeError, match="freezes none of the norm sites"):
        make_recipe(job, sites)


def test_special_tokens_move_with_the_schedule(monkeypatch):
    """The cap rises when all norms are frozen, wherever that is."""
    before = replace(
        BY_NAME["distilled"](SITES, steps=1000),
        special=Special(outliers_from=500, outliers_until=600),
    )
    monkeypatch.setitem(BY_NAME, "measured", lambda sites, steps: before)
    later = make_recipe(RemovalJob(start=400, special_outliers_until=990, steps=1000), SITES)
    shift = 400 - min(event.step for event in before.events)
    assert shift > 0
    assert last_step(later.events) == last_step(before.events) + shift
    assert later.special.outliers_from == before.special.outliers_from + shift
    assert later.special.outliers_until == 990
    special = Special(first_until=30, outliers_from=4, outliers_until=9)
    assert special.moved(5) == Special(first_until=35, outliers_from=9, outliers_until=14)
    assert special.moved(-20) == Special(first_until=10, outliers_until=1)


def test_options_replace_parts_of_the_settings():
    job = RemovalJob(
        recipe="published-style", sigma_share_ln1=False, sigma_sequences=8, special_first_until=0,
        lr=1e-5, steps=300,
    )  # fmt: skip
    recipe, before = make_recipe(job, SITES), BY_NAME["published-style"](SITES, steps=300)
    assert recipe.statistics == replace(before.statistics, share_ln1=False, sequences=8)
    assert recipe.special.first_until == 0
    assert (recipe.lr, recipe.steps) == (1e-5, 300)
    assert recipe.events == before.events


def test_a_config_has_the_sites_of_its_model(gpt2_folder, tmp_path):
    model = lf.load(gpt2_folder)
    assert sites_of(config_of(gpt2_folder)) == lf.list_norm_sites(model)
    lf.export(lf.to_rms(model).model, tmp_path / "rms", target="transformer_lens")
    assert config_of(tmp_path / "rms").normalization_type == "RMSPre"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        config_of(tmp_path / "empty")
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(CheckpointError, match="lnfree convert"):
        config_of(tmp_path / "ckpt.pt")


def ticks(step):
    """A clock on which every reading is later by as much."""
    return (step * i for i in count()).__next__


def test_a_trial_counts_micro_batches_optimiser_and_forward_passes():
    recipe = replace(
        BY_NAME["distilled"](SITES, steps=100), batch=8, micro_batch=4, evaluate_every=30,
        distillation=Ramp(1.0, 0.0, 0, 60),
    )  # fmt: skip
    trial = Trial(
        recipe=recipe, sequences=2, sequence_length=16, heldout=6,
        micro_batch={True: 3.0, False: 1.0}, optimizer=0.5, forward=0.25, weights=10, gradients=10,
        trained=10, original=10, activations=7_000, peak="", machine="",
    )  # fmt: skip
    assert sum(distils_at(recipe, step) for step in range(100)) == 60
    measured = len({event.step for event in recipe.events}) * 64  # each at its event
    passes = 0.25 * (measured + 6 * 4) / 2
    assert trial.seconds == 4 * (60 * 3.0 + 40 * 1.0) + 100 * 0.5 + passes
    control = replace(trial, recipe=recipe.vanilla(), micro_batch={False: 1.0})
    assert control.seconds == 4 * 100 + 100 * 0.5 + 0.25 * 24 / 2
    shown = str(trial)
    assert "3 s with distillation, 1 s without distillation" in shown
    assert "activations of 4 sequences 14 kB" in shown
    assert "original" in shown
    assert "original" not in str(control)
    assert "average of the weights" not in shown
    averaged = replace(trial, recipe=replace(recipe, weight_average=0.9), trained=3_000_000)
    assert "average of the weights 3 MB" in str(averaged)


@pytest.mark.parametrize("distillation", [0.0, 1.0, Ramp(0.0, 1.0, 4, 9)], ids=str)
def test_a_trial_runs_the_recipes_own_steps(distillation):
    model = live_model("gpt2", torch.float32, n_layer=2)
    recipe = replace(
        BY_NAME["distilled"](model, steps=20), distillation=distillation, precision="float32"
    )
    kinds = {0.0: {False}, 1.0: {True}}.get(distillation, {True, False})
    n = sum(W.numel() for W in model.parameters())
    trial = try_steps(model, recipe, 24, clock=ticks(0.01))
    assert trial.sequences == recipe.micro_batch == 4
    assert set(trial.micro_batch) == kinds
    assert trial.micro_batch[max(kinds)] == pytest.approx(0.01)
    # The embedding is tied, as in a run.
    assert 4 * n > trial.weights == trial.gradients > 2 * n
    # Each block keeps its input, and more, of every token.
    assert trial.activations > 2 * 4 * (4 * 24 * model.cfg.d_model)


def test_a_trial_has_the_unembedding_that_a_run_with_an_embedding_cap_unties():
    recipe = replace(BY_NAME["distilled"](SITES, steps=20), precision="float32")
    sizes = {
        cap: try_steps(
            live_model("gpt2", torch.float32, n_layer=2),
            replace(recipe, embedding_cap=cap), 24, clock=ticks(0.01),
        ).gradients
        for cap in (0.0, 1.3)
    }  # fmt: skip
    model = live_model("gpt2", torch.float32, n_layer=2)
    assert sizes[1.3] - sizes[0.0] == model.W_U.nbytes


def test_a_trial_runs_the_teacher_of_the_run():
    model, teacher = (live_model("gpt2", torch.float32, n_layer=n) for n in (2, 4))
    recipe = replace(BY_NAME["distilled"](model, steps=20), precision="float32")
    trial = try_steps(model, recipe, 24, teacher=teacher, clock=ticks(0.01))
    own = try_steps(live_model("gpt2", torch.float32, n_layer=2), recipe, 24, clock=ticks(0.01))
    assert own.original == own.weights
    assert trial.original > own.original
    assert trial.weights == own.weights
    assert trial.micro_batch.keys() == {True}
    asked = str(replace(trial, original=2_500_000_000))
    assert "original 2.5 GB" in asked


def test_a_slow_machine_is_given_smaller_micro_batches():
    model = live_model("gpt2", torch.float32, n_layer=2)
    recipe = replace(BY_NAME["distilled"](model, steps=20), micro_batch=8)
    trial = try_steps(model, recipe, 24, clock=ticks(2.0))
    assert trial.sequences == 2
    assert "2 x 24 random tokens" in str(trial)
    assert "activations of 8 sequences" in str(trial)


def test_a_trial_that_does_not_fit_says_what_to_do(monkeypatch):
    model = live_model("gpt2", torch.float32, n_layer=2)

    def out_of_memory(*_args, **_more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lnfree_interp.removal.trial.Objective.forward", out_of_memory)
    with pytest.raises(RecipeError, match=r"4 x 24 tokens does not fit .* smaller micro_batch"):
        try_steps(model, BY_NAME["distilled"](model, steps=20), 24)


@pytest.mark.parametrize(("world", "batch"), [(1, 2), (2, 2), (3, 3), (8, 8)])
def test_every_process_has_a_sequence_of_the_default_recipe(monkeypatch, world, batch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert make_recipe(RemovalJob(), SITES).batch == batch
    assert make_recipe(RemovalJob(batch=6), SITES).batch == 6
    assert make_recipe(RemovalJob(recipe="distilled"), SITES).batch == 8


@pytest.mark.parametrize("recipe", ["measured", "distilled"])
def test_norms_can_go_in_stages_and_the_original_stays_the_teacher(gpt2_folder, tmp_path, recipe):
    text = tmp_path / "text.txt"
    text.write_text("for i in range(10):\n    print(i)\n" * 400)
    job = RemovalJob(
        model=str(gpt2_folder), data=str(text), recipe=recipe, sequence_length=16, heldout=4,
        kinds=("ln1.v", "ln_final"), steps=40, batch=2, micro_batch=2,
    )  # fmt: skip
    run_job(job, tmp_path / "first", progress=False)
    first = lf.load(tmp_path / "first" / "model")
    assert {site.kind for site in lf.live_sites(first)} == {"ln1.qk", "ln2"}
    rest = replace(
        job, model=str(tmp_path / "first" / "model"), kinds=None, teacher=str(gpt2_folder)
    )
    run = run_job(rest, tmp_path / "rest", progress=False)
    assert {event.site for event in run.recipe.events} == set(lf.live_sites(first))
    assert run.history[0].losses["distillation"] > 1e-4  # from the original, not from the first
    assert find_model(tmp_path / "rest").original == str(gpt2_folder)  # not the first stage
    finished = lf.load(tmp_path / "rest" / "model")
    assert not lf.live_sites(finished)
    lf.compare_logits(finished, run.model).require("the finished model")
    control = run_job(replace(rest, vanilla=True), tmp_path / "control", progress=False)
    assert lf.live_sites(control.model) == lf.live_sites(first)
    with pytest.raises(RecipeError, match=r"no norm site of the kind ln1\.v; it has ln1\.qk, ln2"):
        run_job(replace(rest, kinds=("ln1.v",)), tmp_path / "again", progress=False)


@pytest.mark.parametrize("make", [lf.to_peri_ln, lf.to_layernorm_scaling, lf.to_dyt])
def test_a_variant_loses_its_norms_by_a_job_too(gpt2_folder, tmp_path, make):
    """Its folder is in TransformerLens' layout, and so is what comes out if no class holds it."""
    live = make(lf.load(gpt2_folder)).model
    lf.export(live, tmp_path / "variant", target="transformer_lens")
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 300)
    job = RemovalJob(
        model=str(tmp_path / "variant"), data=str(text), sequence_length=16, heldout=4, steps=30,
        recipe="at-once", batch=2, micro_batch=2, lr=1e-6,
    )  # fmt: skip
    run = run_job(job, tmp_path / "run", progress=False)
    again = lf.load(tmp_path / "run" / "model")
    assert lf.live_sites(again) == ()
    lf.compare_logits(again, run.model).require("written", 1e-5)


def test_the_plan_is_that_of_the_run(tokenizer, tmp_path, monkeypatch):
    """Of a model with massive activations, whose recipe is another than that of ordinary ones."""
    network = make_gpt2()
    network.transformer.wte.weight.data[tokenizer.encode(" range")[0]] *= 200
    network.save_pretrained(tmp_path / "massive")
    tokenizer.save_pretrained(tmp_path / "massive")
    text = tmp_path / "text.txt"
    text.write_text("for i in range(10):\n    print(i)\n" * 400)
    job = RemovalJob(
        model=str(tmp_path / "massive"), data=str(text), sequence_length=16, heldout=0, steps=40,
        batch=2, micro_batch=2,
    )  # fmt: skip
    planned, said = [], []

    def stop(*args, **more):
        raise PausedError("before the first step")

    run_job(job, None, only_plan=True, progress=False, say=planned.append)
    monkeypatch.setattr("lnfree_interp.removal.run_job.remove_norms", stop)
    with pytest.raises(PausedError):
        run_job(job, tmp_path / "run", progress=False, say=said.append)
    plan = next(line for line in planned if line.startswith("recipe: measured"))
    assert "outliers" in plan
    assert plan in said


def test_costs_are_measured_once(gpt2_folder, tmp_path, monkeypatch):
    """The second run reads them; those of another model, and other files, are refused."""
    text, file = tmp_path / "text.txt", tmp_path / "costs.json"
    text.write_text("for i in range(10):\n    print(i)\n" * 400)
    job = RemovalJob(
        model=str(gpt2_folder), data=str(text), sequence_length=16, heldout=0, steps=40,
        costs=str(file),
    )  # fmt: skip
    recipes, measured = [], []
    right = run_job_module.site_sensitivity

    def keep(model, recipe, data, **more):
        recipes.append(recipe)
        raise PausedError("enough")

    def measure(*args, **more):
        measured.append(args)
        return right(*args, **more)

    monkeypatch.setattr(run_job_module, "remove_norms", keep)
    monkeypatch.setattr(run_job_module, "site_sensitivity", measure)
    for number in range(2):
        with pytest.raises(PausedError):
            run_job(job, tmp_path / f"run-{number}", progress=False)
    assert len(measured) == 1
    assert recipes[0] == recipes[1]
    some = replace(job, kinds=("ln2",))
    with pytest.raises(PausedError):
        run_job(some, tmp_path / "some", progress=False)
    assert len(measured) == 1
    assert {event.site.kind for event in recipes[-1].events} == {"ln2"}

    def refused(message, **settings):
        with pytest.raises((DataError, NormSiteError, OutputError), match=message):
            run_job(replace(job, **settings), tmp_path / "none", progress=False)

    make_gpt2(seed=5).save_pretrained(tmp_path / "other")
    shutil.copy(Path(gpt2_folder) / "tokenizer.json", tmp_path / "other")
    shutil.copy(Path(gpt2_folder) / "tokenizer_config.json", tmp_path / "other")
    refused("norms of another model", model=str(tmp_path / "other"))
    refused("is not a file that", costs=str(Path(gpt2_folder) / "config.json"))
    refused("cannot be read", costs=str(text))
    refused("not a writable folder", costs=str(tmp_path / "no" / "costs.json"))
    plain = json.loads(file.read_text())
    del plain["costs"]["alone"]["ln_final"]
    file.write_text(json.dumps(plain))
    refused("what ln_final costs was not measured")
    plain["costs"]["alone"] = 3
    file.write_text(json.dumps(plain))
    refused("not costs of norm sites")


def test_costs_survive_json():
    costs = lf.site_sensitivity(
        live_model("gpt2", torch.float32), torch.randint(300, (2, 16)), progress=False
    )
    again = lf.SiteSensitivity.from_json(json.loads(json.dumps(costs.to_json())))
    assert all(getattr(again, name) == value for name, value in vars(costs).items())
    some = costs.select(costs.order[:3])
    assert set(some.alone) == set(costs.order[:3])
    assert some.together == {}
    assert costs.select(costs.alone) is costs
    with pytest.raises(NormSiteError, match="nor that of 1 more"):
        some.select(costs.order[:5])
