"""An adapter is what training changed of a base, and `load` puts it back."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from support.architectures import make_model
from support.models import TEXT as SENTENCES
from support.models import make_gpt2, make_tokenizer

import lnfree_interp as lf
from lnfree_interp.checkpoints.loading import config_of, saved_live_sites
from lnfree_interp.errors import (
    CheckpointError,
    InexactError,
    OutputError,
    UnsupportedModelError,
)
from lnfree_interp.models.sites import stock_weights

TEXT = torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "gpt2"
    make_gpt2(n_layer=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def tuned(base, trainable, recipe=lf.recipes.finetuning, steps=4, **changes):
    model = lf.load(base)
    made = recipe(steps=steps, batch=2) if recipe is lf.recipes.finetuning else recipe(model)
    made = replace(made, trainable=trainable, precision="float32", **changes)
    return lf.remove_norms(model, made, TEXT, progress=False).model


def same_weights(one, other):
    one, other = (stock_weights(lf.with_norm_sites(model)) for model in (one, other))
    return one.keys() == other.keys() and all(torch.equal(W, other[n]) for n, W in one.items())


@pytest.mark.parametrize("trainable", ["norms:ln2", ("L1H1", "30% of mlps"), "all"])
def test_what_is_put_back_is_bit_for_bit_the_same(base, tmp_path, trainable):
    model = tuned(base, trainable)
    folder = lf.export_adapter(model, tmp_path / "adapter", base)
    back = lf.load(folder)
    assert same_weights(back, model)
    assert back.tokenizer is not None
    stored = safetensors.torch.load_file(folder / "adapter.safetensors")
    if trainable == "norms:ln2":
        assert stored.keys() == {f"blocks.{n}.ln2.{x}" for n in (0, 1) for x in "wb"}
    elif trainable != "all":
        mask = lf.select_parameters(lf.load(base), *trainable)
        values = [W for name, W in stored.items() if not name.endswith("|index")]
        # A step may be too small for the last bit of an entry.
        assert 0.99 * mask.count < sum(W.numel() for W in values) <= mask.count


def test_a_removal_comes_back_with_its_constants(base, tmp_path):
    model = tuned(base, "norms", lambda model: lf.recipes.distilled(model, steps=20), batch=2)
    assert lf.live_sites(model) == ()
    folder = lf.export_adapter(model, tmp_path / "adapter", base)
    back = lf.load(folder)
    assert same_weights(back, model)
    for site in lf.list_norm_sites(model):
        assert lf.get_norm(back, site).sigma.item() == lf.get_norm(model, site).sigma.item()
    for form in ("folded", "frozen"):
        again = lf.load(folder, form=form)
        assert lf.compare_logits(again, model, TEXT[:2]).relative < 1e-5


def test_a_removal_of_some_norms_and_first_constants(base, tmp_path):
    model = lf.with_norm_sites(lf.load(base))
    lf.freeze_site(model, "ln_final", 2.0, first=3.0)
    lf.freeze_site(model, "blocks.0.ln1.v", 1.5)
    folder = lf.export_adapter(model, tmp_path / "adapter", base)
    assert safetensors.torch.load_file(folder / "adapter.safetensors") == {}
    back = lf.load(folder)
    assert lf.live_sites(back) == lf.live_sites(model)
    assert torch.equal(back(TEXT[:2]), model(TEXT[:2]))


@pytest.mark.parametrize("trained", [True, False])
def test_in_another_dtype(base, tmp_path, trained):
    model = tuned(base, ("L0H1", "norms")) if trained else lf.with_norm_sites(lf.load(base))
    lf.freeze_site(model, "ln_final", 2.0)
    folder = lf.export_adapter(model, tmp_path / "adapter", base)
    assert lf.load(folder, dtype=torch.float64).cfg.dtype == torch.float64
    half = model.to(torch.bfloat16)
    half.cfg.dtype = torch.bfloat16
    lf.load(lf.export_adapter(half, tmp_path / "half", base))


def test_a_norm_that_lives_again(base, tmp_path):
    frozen = lf.with_norm_sites(lf.load(base))
    lf.freeze_site(frozen, "ln_final", 2.0)
    lf.freeze_site(frozen, "blocks.0.ln2", 2.0)
    below = lf.export(frozen, tmp_path / "frozen", target="transformer_lens")
    lf.get_norm(frozen, "ln_final").thaw()
    folder = lf.export_adapter(frozen, tmp_path / "adapter", below)
    back = lf.load(folder)
    assert lf.live_sites(back) == lf.live_sites(frozen)
    assert torch.equal(back(TEXT[:2]), frozen(TEXT[:2]))
    assert saved_live_sites(folder) == lf.live_sites(frozen)


def test_of_an_lnfree_folder(base, tmp_path):
    frozen = lf.with_norm_sites(lf.load(base))
    for site in lf.list_norm_sites(frozen):
        lf.freeze_site(frozen, site, 2.0)
    below = lf.export(frozen, tmp_path / "lnfree")
    model = lf.load(below, form="sites")
    recipe = replace(lf.recipes.finetuning(steps=2, batch=2), trainable="biases")
    run = lf.finetune(model, recipe, TEXT, progress=False)
    folder = lf.export_adapter(run.model, tmp_path / "adapter", below)
    assert same_weights(lf.load(folder), run.model)
    assert lf.load(folder, form="folded").cfg.normalization_type is None


def test_a_stock_model_comes_back(base, tmp_path):
    model = lf.load(base)
    with torch.no_grad():
        model.W_E[3] += 1
        model.W_U.copy_(model.W_E.T)
        model.blocks[0].attn.b_Q[1, 2] -= 1
    folder = lf.export_adapter(model, tmp_path / "adapter", base)
    stored = safetensors.torch.load_file(folder / "adapter.safetensors")
    assert {name.partition("|")[0] for name in stored} == {"embed.W_E", "blocks.0.attn.b_Q"}
    assert same_weights(lf.load(folder), model)


def test_an_unembedding_that_was_untied(base, tmp_path):
    model = tuned(base, ("norms", "embed"), lf.recipes.finetuning, embedding_cap=0.9)
    assert not torch.equal(model.W_U, model.W_E.T)
    back = lf.load(lf.export_adapter(model, tmp_path / "adapter", base))
    assert torch.equal(back.W_U, model.W_U)
    assert torch.equal(back.W_E, model.W_E)


@pytest.mark.parametrize("kind", ["llama-grouped", "gemma2", "neox"])
def test_other_architectures(kind, tmp_path):
    folder = tmp_path / "base"
    make_model(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model = tuned(folder, ("norms", "L1H1"))
    back = lf.load(lf.export_adapter(model, tmp_path / "adapter", folder))
    assert same_weights(back, model)


def test_an_adapter_of_an_adapter(base, tmp_path):
    first = lf.export_adapter(tuned(base, "norms"), tmp_path / "first", base)
    model = tuned(first, "L0H0")
    second = lf.export_adapter(model, tmp_path / "second", first)
    assert same_weights(lf.load(second), model)
    assert {n.partition(".attn")[0] for n in safetensors.torch.load_file(
        second / "adapter.safetensors")} == {"blocks.0"}  # fmt: skip


def test_a_variant_is_the_base_of_its_own(base, tmp_path):
    dyt = lf.to_dyt(lf.load(base), tokens=TEXT).model
    folder = lf.export(dyt, tmp_path / "dyt", target="transformer_lens")
    model = tuned(folder, "norms")
    back = lf.load(lf.export_adapter(model, tmp_path / "adapter", folder))
    assert torch.equal(back(TEXT[:2]), model(TEXT[:2]))
    with pytest.raises(UnsupportedModelError, match="other norms or other tensors"):
        lf.export_adapter(model, tmp_path / "wrong", base)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return lf.export_adapter(tuned(base, "norms"), tmp_path_factory.mktemp("a") / "a", base)


class TestWrong:
    def test_base(self, adapter, base, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(base, other)
        make_gpt2(n_layer=2, seed=5).save_pretrained(other)
        with pytest.raises(InexactError, match="an adapter of"):
            lf.load(adapter, base=other)
        lf.load(adapter, base=other, check=False)
        moved = shutil.copytree(base, tmp_path / "moved")
        assert same_weights(lf.load(adapter, base=moved), lf.load(adapter))
        shallow = shutil.copytree(base, tmp_path / "shallow")
        make_gpt2(n_layer=1).save_pretrained(shallow)
        with pytest.raises(CheckpointError, match=r"blocks\.1\..* does not fit"):
            lf.load(adapter, base=shallow)
        with pytest.raises(CheckpointError, match="base is for adapters"):
            lf.load(base, base=other)

    def test_model(self, adapter, base, tmp_path):
        folded = lf.load(adapter)
        for site in lf.list_norm_sites(folded):
            lf.freeze_site(folded, site, 1.0)
        with pytest.raises(UnsupportedModelError, match="fold it after loading"):
            lf.export_adapter(lf.fold(folded), tmp_path / "out", base)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        with pytest.raises(OutputError):
            lf.export_adapter(lf.load(base), tmp_path / "full", base)
        with pytest.raises(CheckpointError):
            lf.export_adapter(lf.load(base), tmp_path / "out", tmp_path / "nothing")

    @pytest.mark.parametrize("change", [
        {"version": 9}, {"base": None}, {"frozen": 3}, {"frozen": {"blocks.0.ln2": "x"}},
        {"logits": "no"}, {"revision": 3}, {"sites": ...}, {"dtype": "int8"}, {"base_form": 1},
        {"tokens": [[1_000_000]]}, {"frozen": {"blocks.9.ln2": 1.0}}, {"frozen": {"ln_final": -1}},
    ])  # fmt: skip
    def test_json(self, adapter, tmp_path, change):
        folder = shutil.copytree(adapter, tmp_path / "copy")
        file = folder / "lnfree_adapter.json"
        content = json.loads(file.read_text())
        for name, value in change.items():
            if value is ...:
                del content[name]
            else:
                content[name] = value
        file.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"lnfree_adapter\.json"):
            lf.load(folder)

    def test_circle(self, adapter, tmp_path):
        folder = shutil.copytree(adapter, tmp_path / "copy")
        content = json.loads((folder / "lnfree_adapter.json").read_text())
        content["base"] = str(folder)
        (folder / "lnfree_adapter.json").write_text(json.dumps(content))
        for call in (lf.load, config_of, saved_live_sites):
            with pytest.raises(CheckpointError, match="the base of itself"):
                call(folder)

    @pytest.mark.parametrize(
        "damage", ["missing", "cut", "nan", "shape", "index", "kind", "unknown"]
    )
    def test_weights(self, adapter, tmp_path, damage):
        folder = shutil.copytree(adapter, tmp_path / "copy")
        file = folder / "adapter.safetensors"
        stored = safetensors.torch.load_file(file)
        name = "blocks.0.ln2.w"
        if damage == "missing":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:-40])
        else:
            if damage == "nan":
                stored[name][0] = float("nan")
            elif damage == "shape":
                stored[name] = stored[name][:-1].clone()
            elif damage == "index":
                values = stored.pop(name)[:3].clone()
                stored |= {f"{name}|values": values, f"{name}|index": torch.tensor([0, 1, 999])}
            elif damage == "kind":
                values = stored.pop(name)[:3].clone()
                index = torch.tensor([True, False, True])
                stored |= {f"{name}|values": values, f"{name}|index": index}
            else:
                stored["blocks.9.ln2.w"] = stored.pop(name)
            safetensors.torch.save_file(stored, file)
        with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
            lf.load(folder)


def test_the_demo_sentence_is_read_by_its_tokenizer(base, tmp_path):
    folder = lf.export_adapter(tuned(base, "biases"), tmp_path / "adapter", base)
    tokens = lf.load(folder).to_tokens(SENTENCES[0], prepend_bos=False)
    assert torch.equal(tokens, lf.load(base).to_tokens(SENTENCES[0], prepend_bos=False))
