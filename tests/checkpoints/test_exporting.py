"""What goes out is an ordinary Hugging Face folder with the same logits, or nothing."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import make_model
from transformers import AutoTokenizer, GPT2LMHeadModel

import lnfree_interp as lf
from lnfree_interp.errors import (
    CheckpointError,
    InexactError,
    NormSiteError,
    OutputError,
    UnsupportedModelError,
)
from lnfree_interp.files import write_new_file
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import sequential_sites

TIGHT = {torch.float64: 1e-10, torch.float32: 1e-5}


def test_lnfree_folder_in_plain_transformers(folded, dtype, tmp_path):
    lf.export(folded, tmp_path / "model")
    hf_model = GPT2LMHeadModel.from_pretrained(tmp_path / "model", dtype=dtype)
    # float64: an epsilon of 1e12 itself is off by variance / 2e12.
    assert lf.compare_logits(hf_model, folded).relative <= TIGHT[dtype]
    assert hf_model.config.layer_norm_epsilon == 1e12


def test_lnfree_folder_comes_back_folded(folded, dtype, tmp_path):
    lf.export(folded, tmp_path / "model")
    back = lf.load(tmp_path / "model", dtype=dtype)
    assert back.cfg.normalization_type is None
    assert lf.compare_logits(back, folded).relative <= TIGHT[dtype]


def is_tied(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_a_folded_model_is_tied_again(folded, frozen, dtype, tmp_path):
    """W_U is C diag(a) W_E^T and b_U is W_E beta: a and beta go back into ln_f."""
    lf.export(folded, tmp_path / "model")
    assert is_tied(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    final = lf.get_norm(frozen, "ln_final")
    gain = weights["transformer.ln_f.weight"] / 1e6
    lf.numerics.measure_error(gain, final.w / final.sigma).require("gain", 1e-4)


def test_what_cannot_be_tied_goes_out_untied(folded, dtype, tmp_path):
    """With its bias, on the direction that centring has emptied."""
    with torch.no_grad():
        noise = 0.01 * torch.randn_like(folded.W_U)
        folded.unembed.W_U.add_(noise - noise.mean(0))
        folded.unembed.b_U.add_(0.1 * torch.randn_like(folded.b_U))
    lf.export(folded, tmp_path / "model")
    assert "lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")
    back = lf.load(tmp_path / "model", dtype=dtype)
    assert lf.compare_logits(back, folded).relative <= TIGHT[dtype]


def test_frozen_sites_go_out_as_the_published_checkpoints_do(frozen, dtype, tmp_path):
    """Gains, biases and ties as they are; q/k and v, which divide differently, share one norm."""
    lf.export(frozen, tmp_path / "model")
    assert is_tied(tmp_path / "model")
    hf_model = GPT2LMHeadModel.from_pretrained(tmp_path / "model", dtype=dtype)
    assert lf.compare_logits(hf_model, frozen).relative <= TIGHT[dtype]
    folded = lf.load(tmp_path / "model", dtype=dtype)
    assert lf.compare_logits(folded, lf.fold(frozen)).relative <= TIGHT[dtype]


def test_the_sidecar_makes_the_export_invertible(frozen, dtype, tmp_path):
    lf.export(frozen, tmp_path / "model")
    back = lf.load(tmp_path / "model", form="sites", dtype=dtype)
    assert lf.live_sites(back) == ()
    assert back.cfg.eps == frozen.cfg.eps
    for site in lf.list_norm_sites(frozen):
        old, new = lf.get_norm(frozen, site), lf.get_norm(back, site)
        assert old.sigma.item() == new.sigma.item()
    for name, W in frozen.named_parameters():
        error = lf.numerics.measure_error(back.get_parameter(name), W)
        assert error.relative <= {torch.float64: 1e-14, torch.float32: 1e-6}[dtype], name
    for model in (frozen, back):
        for site in lf.list_norm_sites(model):
            lf.get_norm(model, site).thaw()
    lf.compare_logits(back, frozen).require("thawed again")


def test_the_frozen_form_comes_back_with_its_constants(frozen, dtype, tmp_path):
    tools = lf.frozen_form(frozen)
    lf.export(tools, tmp_path / "hf")
    lf.export(tools, tmp_path / "native", target="transformer_lens")
    for folder in ("hf", "native"):
        back = lf.load(tmp_path / folder, form="frozen", dtype=dtype)
        assert lf.compare_logits(back, frozen).relative <= TIGHT[dtype]
        assert back.blocks[1].ln1.sigma.item() == tools.blocks[1].ln1.sigma.item()
        assert back.ln_final.sigma.item() == tools.ln_final.sigma.item()
    assert lf.load(tmp_path / "native", form="folded").cfg.normalization_type is None


def test_the_model_card_names_what_was_trained(live, tmp_path):
    mask = lf.select_parameters(live, "20% of norms")
    release = (lf.Release(trainable=mask, at=3),)
    recipe = replace(lf.recipes.finetuning(steps=9), trainable=mask, release=release)
    lf.export(live, tmp_path / "model", recipe=recipe)
    card = (tmp_path / "model/README.md").read_text()
    assert card.count("some entries of blocks.0.ln1.w") == 2
    assert "bits" not in card
    sidecar = lf.formats.read_sidecar(tmp_path / "model")
    assert Recipe.from_json(sidecar.recipe) == recipe


def test_the_model_card_says_what_the_model_is(frozen, dtype, tmp_path):
    recipe = lf.recipes.distilled(sequential_sites(3), steps=20)
    error = lf.compare_logits(lf.fold(frozen), frozen)
    lf.export(
        frozen, tmp_path / "model", recipe=recipe, errors={"folded against frozen": error},
        source="some/model",
    )  # fmt: skip
    card = (tmp_path / "model/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:")
    assert "model, without LayerNorm" in card
    assert f"| folded against frozen | {error.relative:.1e} |" in card
    assert f"| distillation | {recipe.distillation} |" in card
    sigma = lf.get_norm(frozen, "blocks.0.ln1.qk").sigma.item()
    assert f"| `blocks.0.ln1.qk` | {sigma:.6g} |" in card
    sidecar = lf.formats.read_sidecar(tmp_path / "model")
    assert sidecar.form == "sites"
    assert sidecar.recipe["steps"] == 20
    assert sidecar.recipe["events"][0] == [0, "blocks.0.ln2", 0]
    assert sidecar.errors["export against HookedTransformer"]["relative"] < 1e-5
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": 9}',
        '{"version": 1, "form": "x", "surprise": 1}',
        '{"version": 1, "form": "x", "sigma": {"ln_final": -1}}',
    ],
)
def test_a_broken_sidecar_is_named(content, folded, tmp_path):
    lf.export(folded, tmp_path / "model")
    (tmp_path / "model/lnfree.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"lnfree\.json"):
        lf.load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["live", "folded", "frozen", "rms", "crms", "crms-drop"])
def test_the_layout_of_transformer_lens_holds_everything(kind, live, frozen, dtype, tmp_path):
    make = {
        "live": lambda: live,
        "folded": lambda: lf.fold(frozen),
        "frozen": lambda: lf.frozen_form(frozen),
        "rms": lambda: lf.to_rms(live).model,
        "crms": lambda: lf.to_crms(live).model,
        "crms-drop": lambda: lf.to_crms(live, "drop").model,
    }
    model = make[kind]()
    lf.export(model, tmp_path / "out", target="transformer_lens")
    back = lf.load(tmp_path / "out", dtype=dtype)
    assert lf.compare_logits(back, model).relative == 0
    assert back.to_str_tokens("def add") == model.to_str_tokens("def add")
    assert back.cfg.to_dict().keys() == model.cfg.to_dict().keys()


def test_rotary_models_go_through_the_layout_of_transformer_lens(tmp_path):
    model = lf.load(make_model("qwen3"))
    lf.export(model, tmp_path / "out", target="transformer_lens")
    assert lf.compare_logits(lf.load(tmp_path / "out"), model).relative == 0


def test_damage_to_the_layout_of_transformer_lens_is_named(folded, tmp_path):
    import shutil

    lf.export(folded, tmp_path / "out", target="transformer_lens")

    def damaged(name, content):
        copy = tmp_path / f"copy-{name}-{len(content)}"
        shutil.copytree(tmp_path / "out", copy)
        (copy / name).write_bytes(content)
        return copy

    config = json.loads((tmp_path / "out/hooked_transformer.json").read_text())
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    lies = [
        {"version": 2},
        {"config": config["config"] | {"n_heads": 8}},
        {"config": config["config"] | {"n_layers": 900}},
        {"config": config["config"] | {"act_fn": "mish"}},
        {"config": config["config"] | {"surprise": 1}},
        {"config": None},
    ]
    for lie in lies:
        folder = damaged("hooked_transformer.json", json.dumps(config | lie).encode())
        with pytest.raises(CheckpointError):
            lf.load(folder)
        shutil.rmtree(folder)
    for content in (b"", weights[:-100], weights[:20]):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            lf.load(damaged("model.safetensors", content))


def test_transformer_lens_layout_holds_norm_sites(frozen, dtype, tmp_path):
    folder = lf.export(frozen, tmp_path / "out", target="transformer_lens")
    back = lf.load(folder, dtype=dtype)
    assert lf.compare_logits(back, frozen).relative <= TIGHT[dtype]
    assert lf.list_norm_sites(back) == lf.list_norm_sites(frozen)
    assert lf.fold(back).cfg.normalization_type is None


def test_live_folder_stays_tied(live, dtype, tmp_path):
    lf.export(live, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["tie_word_embeddings"]
    back = lf.load(tmp_path / "model", dtype=dtype)
    assert lf.compare_logits(back, live).relative <= TIGHT[dtype]


def test_tokenizer_goes_along_unchanged(folded, gpt2_folder, tmp_path):
    lf.export(folded, tmp_path / "model")
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "model", gpt2_folder))
    for text in ("def add(self):", "", "  x\n\n"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    "mistake",
    [
        lambda right: (
            lambda *a: {k: W * (1.01 if "c_fc" in k else 1) for k, W in right(*a).items()}
        ),
        lambda right: lambda *a: {k: W + ("ln_f.bias" in k) * 0.1 for k, W in right(*a).items()},
    ],
    ids=["c_fc", "ln_f.bias"],
)
def test_a_mistake_in_the_export_is_caught(mistake, folded, tmp_path, monkeypatch):
    from lnfree_interp.checkpoints import exporting

    monkeypatch.setattr(exporting, "to_hf_weights", mistake(exporting.to_hf_weights))
    with pytest.raises(InexactError, match="exported against"):
        lf.export(folded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_left_alone(folded, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        lf.export(folded, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_interrupted_export_leaves_nothing(folded, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(folded.tokenizer), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lf.export(folded, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_gpt2_cannot_say_is_refused(frozen, folded, live):
    lf.get_norm(frozen, "blocks.1.ln2").thaw()
    with pytest.raises(NormSiteError, match="1 of 10 norm sites are live"):
        lf.formats.to_transformers(frozen)
    with torch.no_grad():
        folded.blocks[1].mlp.W_in.add_(0.1)
        live.unembed.b_U.add_(1)
    with pytest.raises(UnsupportedModelError, match="W_in reads the mean"):
        lf.formats.to_transformers(folded)
    with pytest.raises(UnsupportedModelError, match="no unembedding bias"):
        lf.formats.to_transformers(live)


def test_a_new_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    assert write_new_file(out, "ä").read_text(encoding="utf-8") == "ä"
    with pytest.raises(OutputError, match="already exists"):
        write_new_file(out, "b")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]

    def appears(written, path):
        path.write_text("theirs")
        raise FileExistsError

    monkeypatch.setattr(os, "link", appears)
    with pytest.raises(OutputError, match="in the meantime"):
        write_new_file(tmp_path / "raced.html", "ours")
    assert (tmp_path / "raced.html").read_text() == "theirs"

    def no_links(written, path):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert write_new_file(tmp_path / "copied.html", "c").read_text() == "c"
    assert len(list(tmp_path.iterdir())) == 3
