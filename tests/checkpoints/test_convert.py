"""`lnfree convert`: one checkpoint into another, or a plan of it."""

import json
import os
import stat

import pytest
import torch
from support.architectures import lnfree_model, make_model
from support.commands import lnfree
from support.published_formats import fake_layer_norm_state, finished, write_bin, write_nanogpt
from transformers import GPT2LMHeadModel

import lnfree_interp as lf
from lnfree_interp.errors import CheckpointError, NormSiteError, OutputError, UnsupportedModelError


@pytest.fixture
def fake(tmp_path, tokenizer):
    """A FakeLayerNorm checkpoint."""
    model = finished()
    write_bin(model, fake_layer_norm_state(model), tmp_path / "fake")
    tokenizer.save_pretrained(tmp_path / "fake")
    return tmp_path / "fake"


def run(monkeypatch, *arguments):
    lnfree(monkeypatch, "convert", *arguments)


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_a_published_format_becomes_a_folder_for_transformers(
    form, fake, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, fake, tmp_path / "out", "--form", form)
    said = capsys.readouterr().out
    assert "LN-free, FakeLayerNorm checkpoint" in said
    assert f"wrote {tmp_path / 'out'}" in said
    hf_model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    lf.compare_logits(lf.load(fake), hf_model).require("converted")
    assert lf.formats.read_sidecar(tmp_path / "out").form == form
    assert "HookedTransformer against its source" in (tmp_path / "out/README.md").read_text()


def test_a_dry_run_writes_nothing(fake, tmp_path, monkeypatch, capsys):
    before = sorted(tmp_path.rglob("*"))
    run(monkeypatch, fake, tmp_path / "out", "--dry-run")
    said = capsys.readouterr().out
    assert "recognised as  LN-free, FakeLayerNorm checkpoint" in said
    assert f"step 1         write {tmp_path / 'out'} as GPT2LMHeadModel" in said
    assert "nothing was written" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("norm", "basis"), [("rms", "orthonormal"), ("crms", "orthonormal"), ("crms", "drop")]
)
def test_norms_are_converted(norm, basis, gpt2_folder, tmp_path):
    plan = lf.convert(gpt2_folder, tmp_path / "out", to_norm=norm, basis=basis)
    assert plan.target == "transformer_lens"
    assert len(plan.steps) == {"rms": 2, "crms": 3}[norm]
    back = lf.load(tmp_path / "out")
    assert back.cfg.normalization_type == "RMSPre"
    assert back.cfg.d_model == {"rms": 32, "crms": 31}[norm]
    lf.compare_logits(back, lf.load(gpt2_folder)).require("converted")
    if norm == "rms":  # and what was written can be converted further
        lf.convert(tmp_path / "out", tmp_path / "again", to_norm="crms", basis=basis)
        lf.compare_logits(lf.load(tmp_path / "again"), back).require("again")


def test_constants_of_a_nanogpt_file_come_from_json(tmp_path, monkeypatch, tokenizer):
    model = finished(activation_function="gelu")
    write_nanogpt(model, tmp_path / "ckpt.pt")
    names = {"ln_1": "ln1", "ln_2": "ln2"}
    sigma = {
        f"blocks.{name.split('.')[2]}.{names[name[-4:]]}" if ".h." in name else "ln_final": value
        for name, value in model.sigma.items()
    }
    sigma["ln_final"] = [sigma["ln_final"]] * 32
    (tmp_path / "sigma.json").write_text(json.dumps(sigma))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    more = ("--sigma", tmp_path / "sigma.json", "--tokenizer", tmp_path / "tokenizer")
    run(monkeypatch, tmp_path / "ckpt.pt", tmp_path / "out", *more)
    assert lf.load(tmp_path / "out").to_str_tokens("def")[0] == "<|endoftext|>"
    hf_model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    wanted = lf.load(tmp_path / "ckpt.pt", sigma={k: torch.tensor(v) for k, v in sigma.items()})
    lf.compare_logits(hf_model, wanted).require("converted")
    (tmp_path / "sigma.json").write_text("[1, 2]")
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, tmp_path / "ckpt.pt", tmp_path / "x", "--sigma", tmp_path / "sigma.json")
    assert exit.value.code == 2


def test_what_transformers_cannot_hold_goes_to_the_other_layout(tmp_path, tokenizer):
    lnfree_model("neo").save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedModelError, match="no place for"):
        lf.convert(tmp_path / "in", tmp_path / "out", target="transformers")
    assert not (tmp_path / "out").exists()
    assert lf.convert(tmp_path / "in", tmp_path / "out").target == "transformer_lens"
    lf.compare_logits(lf.load(tmp_path / "out"), lf.load(tmp_path / "in")).require("converted")


def test_requests_that_contradict_themselves_or_the_model(gpt2_folder, fake, tmp_path, tokenizer):
    with pytest.raises(NormSiteError, match="form is for LN-free models"):
        lf.convert(gpt2_folder, tmp_path / "out", form="folded", to_norm="rms")
    with pytest.raises(NormSiteError, match="its norms are live"):
        lf.convert(gpt2_folder, tmp_path / "out", form="folded")
    with pytest.raises(NormSiteError, match="needs live norms"):
        lf.convert(fake, tmp_path / "out", to_norm="rms")
    with pytest.raises(OutputError, match="already exists"):
        lf.convert(gpt2_folder, fake)
    make_model("llama").save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match="only LayerNorm"):
        lf.convert(tmp_path / "llama", tmp_path / "out", to_norm="crms")
    with pytest.raises(UnsupportedModelError, match="no class for the result"):
        lf.convert(
            gpt2_folder, tmp_path / "out", to_norm="rms", target="transformers", dry_run=True
        )
    with pytest.raises(CheckpointError, match="no such folder"):
        lf.convert(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_is_about_the_model_that_is_there(gpt2_folder, tmp_path):
    """A variant is no stock model, and an option that does nothing is refused."""
    variant = lf.to_dyt(lf.load(gpt2_folder)).model
    lf.export(variant, tmp_path / "dyt", target="transformer_lens")
    plan = lf.convert(tmp_path / "dyt", tmp_path / "out", dry_run=True)
    assert "DyT" in plan.norms
    with pytest.raises(UnsupportedModelError, match="only the norms of a stock model"):
        lf.convert(tmp_path / "dyt", tmp_path / "out", to_norm="rms", dry_run=True)
    with pytest.raises(NormSiteError, match="basis='drop' is for to_norm='crms'"):
        lf.convert(gpt2_folder, tmp_path / "out", basis="drop", dry_run=True)
    for site in lf.list_norm_sites(variant):
        lf.freeze_site(variant, site, 2.0)
    lf.export(variant, tmp_path / "constants", target="transformer_lens")
    folded = lf.convert(tmp_path / "constants", tmp_path / "folded", form="folded")
    assert folded.target == "transformer_lens"  # LayerNorms would subtract what it reads
    lf.compare_logits(lf.load(tmp_path / "folded"), lf.fold(variant)).require("folded")


def test_a_folder_has_the_permissions_of_new_files(gpt2_folder, tmp_path):
    model, before = lf.load(gpt2_folder), os.umask(0o027)
    try:
        lf.export(model, tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_an_interrupted_conversion_leaves_nothing(gpt2_folder, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lnfree_interp.checkpoints.exporting.model_card", interrupt)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, gpt2_folder, tmp_path / "deep/out")
    assert exit.value.code == 130
    assert not (tmp_path / "deep").exists()


def test_the_plan_holds_what_was_measured(gpt2_folder, tmp_path):
    plan = lf.convert(gpt2_folder, tmp_path / "out", to_norm="rms")
    assert set(plan.errors) == {
        "HookedTransformer against its source",
        "RMSNorm against the original",
    }
