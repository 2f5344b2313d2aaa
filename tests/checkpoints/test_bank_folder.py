"""Banks of norms as a folder: what comes back, in every form, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from support.architectures import make_model
from support.loaded import folded_model
from support.models import freeze_all, make_gpt2, make_tokenizer

import lnfree_interp as lf
from lnfree_interp.checkpoints.loading import config_of, saved_live_sites
from lnfree_interp.errors import (
    CheckpointError,
    DataError,
    InexactError,
    NormSiteError,
    OutputError,
    RecipeError,
    UnsupportedModelError,
)
from lnfree_interp.models.sites import stock_weights

TEXT = torch.randint(300, (12, 24), generator=torch.Generator().manual_seed(3))
RECIPE = replace(
    lf.recipes.finetuning(steps=3, batch=4), precision="float32", lr=3e-3, warmup=1,
    guard=lf.Guard(above_best=1e3, sigma_factor=1e6),
)  # fmt: skip


def checkpoint(folder, kind="gpt2", **settings):
    make_model(kind, **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("base") / "gpt2", n_layer=2)


def two_banks(model):
    banks = lf.NormBanks.of(model)
    for name, rows in (("docs", TEXT[:6]), ("code", TEXT[6:])):
        banks.train(name, rows, RECIPE, progress=False)
    banks.fit_keys({"docs": TEXT[:6], "code": TEXT[6:]})
    return banks


@pytest.fixture(scope="module")
def banks(base):
    return two_banks(lf.load(base))


@pytest.fixture(scope="module")
def saved(banks, base, tmp_path_factory):
    return banks.save(tmp_path_factory.mktemp("banks") / "banks", base)


def same(one, other):
    return torch.equal(one(TEXT[:3]), other(TEXT[:3]))


def same_weights(one, other):
    one, other = stock_weights(one), stock_weights(other)
    return one.keys() == other.keys() and all(torch.equal(W, other[n]) for n, W in one.items())


@pytest.mark.parametrize("bank", ["docs", "code", "base"])
def test_a_bank_is_bit_for_bit_the_one_that_was_saved(banks, saved, bank):
    back = lf.load(saved, bank=bank)
    assert same_weights(back, banks.model(bank))
    assert same(back, banks.model(bank))
    assert back.tokenizer is not None
    others = {"docs", "code", "base"} - {bank}
    assert not any(same(back, banks.model(other)) for other in others)


def test_the_folder_has_the_norms_and_nothing_else(saved):
    stored = safetensors.torch.load_file(saved / "adapter.safetensors")
    norms = lf.select_parameters(lf.load(saved, bank="docs"), "norms").chosen
    assert stored.keys() == {f"{d}/{n}" for d in ("docs", "code") for n in [*norms, "key"]}


def test_all_of_it_comes_back_to_go_on(banks, saved):
    back = lf.NormBanks.load(saved)
    assert back.domains == banks.domains
    assert all(same_weights(back.model(d), banks.model(d)) for d in (*banks.domains, "base"))
    assert torch.equal(back.similarity(TEXT), banks.similarity(TEXT))
    rows = TEXT[:4]
    more = lf.NormBanks.load(saved).train("third", rows, RECIPE, progress=False)
    again = lf.NormBanks.load(saved).train("third", rows, RECIPE, progress=False)
    assert same(more.model, again.model)
    assert lf.NormBanks.load(saved, dtype=torch.float64).model().cfg.dtype == torch.float64


def test_without_keys_or_with_some(base, tmp_path):
    banks = lf.NormBanks.of(lf.load(base))
    with pytest.raises(DataError, match="no banks to save"):
        banks.save(tmp_path / "none", base)
    for name in ("docs", "code"):
        banks.train(name, TEXT, RECIPE, progress=False)
    back = lf.NormBanks.load(banks.save(tmp_path / "without", base))
    with pytest.raises(DataError, match="no key is fitted for docs, code"):
        back.select(TEXT)
    banks.fit_keys({"code": TEXT}, layer=1)
    back = lf.NormBanks.load(banks.save(tmp_path / "some", base))
    with pytest.raises(DataError, match="no key is fitted for docs:"):
        back.select(TEXT)
    back.fit_keys({"docs": TEXT})


def test_a_trained_unembedding_comes_back(base, tmp_path):
    banks = two_banks(lf.load(base))
    banks.train_head({"docs": TEXT[:6], "code": TEXT[6:]}, RECIPE, progress=False)
    folder = banks.save(tmp_path / "banks", base)
    assert same(lf.load(folder, bank="docs"), banks.model("docs"))
    back = lf.NormBanks.load(folder)
    assert all(same(back.model(d), banks.model(d)) for d in ("docs", "code", "base"))
    assert "unembed.W_U" in safetensors.torch.load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("target", ["transformers", "transformer_lens"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_every_form_of_an_lnfree_model(kind, target, tmp_path):
    below = lf.load(checkpoint(tmp_path / "live", kind))
    lnfree = lf.export(freeze_all(below), tmp_path / "lnfree", target=target)
    banks = two_banks(lf.load(lnfree, form="sites"))
    folder = banks.save(tmp_path / "banks", lnfree)
    for domain in banks.domains:
        model = banks.model(domain)
        assert same(lf.load(folder, bank=domain), model)
        assert same(lf.load(folder, bank=domain, form="sites"), model)
        for form, finish in (("folded", lf.fold), ("frozen", lf.frozen_form)):
            back = lf.load(folder, bank=domain, form=form)
            assert same_weights(back, finish(model))
            assert same(back, finish(model))
    assert lf.load(folder, bank="docs", form="folded").cfg.normalization_type is None
    assert not same(*(lf.load(folder, bank=d, form="folded") for d in banks.domains))


def test_of_a_run_over_its_own_export(base, tmp_path):
    model = lf.load(base)
    run = lf.remove_norms(model, replace(lf.recipes.distilled(model, steps=12), batch=2), TEXT,
                          progress=False)  # fmt: skip
    lnfree = lf.export(run.model, tmp_path / "lnfree")
    banks = two_banks(run.model)
    folder = banks.save(tmp_path / "banks", lnfree)
    assert same(lf.load(folder, bank="code"), banks.model("code"))
    exported = lf.export(lf.load(folder, bank="code", form="folded"), tmp_path / "code")
    assert lf.compare_logits(lf.load(exported), banks.model("code"), TEXT[:3]).relative < 1e-5


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "neox"])
def test_other_architectures(kind, tmp_path):
    below = checkpoint(tmp_path / "base", kind)
    banks = two_banks(lf.load(below))
    folder = banks.save(tmp_path / "banks", below)
    assert all(same(lf.load(folder, bank=d), banks.model(d)) for d in banks.domains)


def test_some_norms_frozen_and_a_variant(base, tmp_path):
    some = lf.with_norm_sites(lf.load(base))
    lf.freeze_site(some, "ln_final", 2.0, first=3.0)
    banks = two_banks(some)
    folder = banks.save(tmp_path / "some", base)
    back = lf.load(folder, bank="docs")
    assert lf.live_sites(back) == lf.live_sites(some) == saved_live_sites(folder)
    assert same(back, banks.model("docs"))
    with pytest.raises(NormSiteError, match="still live"):
        lf.load(folder, bank="docs", form="folded")
    assert config_of(folder).n_layers == 2
    variant = lf.to_map(lf.load(base), "CRMSNorm").model
    below = lf.export(variant, tmp_path / "crms", target="transformer_lens")
    banks = two_banks(variant)
    assert same(lf.load(banks.save(tmp_path / "of", below), bank="docs"), banks.model("docs"))


class TestWrong:
    def test_bank(self, saved, base):
        with pytest.raises(CheckpointError, match="it holds docs, code, and base"):
            lf.load(saved)
        with pytest.raises(CheckpointError, match=r"no bank 'doc': .* did you mean 'docs'"):
            lf.load(saved, bank="doc")
        with pytest.raises(CheckpointError, match=r"whole model, which has no banks: .* base="):
            lf.load(base, bank="docs")
        with pytest.raises(CheckpointError, match=r"whole model, which has no banks"):
            lf.load(make_gpt2(n_layer=1), bank="docs")
        with pytest.raises(CheckpointError, match="no banks: give a folder"):
            lf.NormBanks.load(base)

    def test_a_folded_export_says_what_to_load(self, base, tmp_path):
        lnfree = lf.export(lf.fold(freeze_all(lf.load(base))), tmp_path / "lnfree")
        with pytest.raises(CheckpointError, match=r"lf.load\(FOLDER, bank='docs', base="):
            lf.load(lnfree, bank="docs")
        with pytest.raises(UnsupportedModelError, match=r"form='sites'.*banks.patch"):
            lf.NormBanks.of(lf.load(lnfree))
        with pytest.raises(UnsupportedModelError, match="folded into its weights"):
            lf.NormBanks.of(folded_model("gpt2"))
        with pytest.raises(UnsupportedModelError, match="folded into its weights"):
            lf.NormBanks.of(lf.to_rms(lf.load(base)).model)

    def test_adapter_without_banks(self, banks, base, tmp_path):
        folder = lf.export_adapter(banks.model("docs"), tmp_path / "adapter", base)
        with pytest.raises(CheckpointError, match="an adapter without banks"):
            lf.load(folder, bank="docs")
        with pytest.raises(CheckpointError, match="no banks: give a folder"):
            lf.NormBanks.load(folder)

    def test_base(self, saved, base, tmp_path):
        other = shutil.copytree(base, tmp_path / "other")
        make_gpt2(n_layer=2, seed=5).save_pretrained(other)
        with pytest.raises(InexactError, match="bank docs of"):
            lf.load(saved, bank="docs", base=other)
        with pytest.raises(InexactError):
            lf.NormBanks.load(saved, base=other)
        moved = shutil.copytree(base, tmp_path / "moved")
        assert same(lf.load(saved, bank="docs", base=moved), lf.load(saved, bank="docs"))

    def test_a_bank_that_was_changed(self, saved, tmp_path):
        folder = shutil.copytree(saved, tmp_path / "copy")
        file = folder / "adapter.safetensors"
        stored = safetensors.torch.load_file(file)
        stored["docs/blocks.0.ln2.w"] += 0.1
        safetensors.torch.save_file(stored, file)
        lf.load(folder, bank="code")
        for call in (lambda: lf.load(folder, bank="docs"), lambda: lf.NormBanks.load(folder)):
            with pytest.raises(InexactError, match="bank docs"):
                call()

    @pytest.mark.parametrize("damage", ["shape", "nan", "unknown", "key", "missing"])
    def test_tensors(self, saved, tmp_path, damage):
        folder = shutil.copytree(saved, tmp_path / "copy")
        file = folder / "adapter.safetensors"
        stored = safetensors.torch.load_file(file)
        name = "docs/blocks.0.ln2.w"
        if damage == "shape":
            stored[name] = stored[name][:-1].clone()
        elif damage == "nan":
            stored[name][0] = float("nan")
        elif damage == "unknown":
            stored["docs/blocks.9.ln2.w"] = stored.pop(name)
        elif damage == "key":
            stored["docs/key"] = stored["docs/key"][:-1].clone()
        else:
            file.unlink()
        if damage != "missing":
            safetensors.torch.save_file(stored, file)
        with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
            lf.NormBanks.load(folder)
        if damage != "key":
            with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
                lf.load(folder, bank="docs")

    @pytest.mark.parametrize("change", [
        {"banks": 3}, {"banks": {"docs": {}}}, {"key_layer": "x"}, {"key_layer": 9},
        {"banks": {"docs": {"tokens": "x", "logits": 1}}},
    ])  # fmt: skip
    def test_json(self, saved, tmp_path, change):
        folder = shutil.copytree(saved, tmp_path / "copy")
        file = folder / "lnfree_adapter.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(CheckpointError, match=r"lnfree_adapter\.json"):
            lf.NormBanks.load(folder)

    def test_training(self, base, saved, tmp_path):
        banks = lf.NormBanks.load(saved)
        with pytest.raises(RecipeError, match="docs has a bank"):
            banks.train("docs", TEXT, RECIPE)
        with pytest.raises(DataError, match="new: there are no tokens"):
            banks.train("new", TEXT[:0], RECIPE)
        for name in ("", "base", "a/b", "a|b", " a"):
            with pytest.raises(DataError, match="cannot name a domain"):
                banks.train(name, TEXT, RECIPE)
        with pytest.raises(DataError, match=r"no bank 'dosc': .* did you mean 'docs'"):
            banks.train("new", TEXT, RECIPE, start="dosc")
        for trainable in ("heads", ("norms", "L0H1"), "biases"):
            with pytest.raises(RecipeError, match="a bank has norms alone"):
                banks.train("new", TEXT, replace(RECIPE, trainable=trainable))
        with pytest.raises(RecipeError, match="set release"):
            banks.train("new", TEXT, replace(RECIPE, release=(lf.Release(trainable="mlps", at=1),)))
        with pytest.raises(RecipeError, match="leaves norms as they are"):
            banks.train("new", TEXT, lf.recipes.distilled(banks.model()))
        assert banks.domains == ("docs", "code")
        for call in (
            banks.model,
            banks.patch,
            lambda d: banks.fit_keys({d: TEXT}),
            lambda d: banks.evaluate({d: TEXT}),
            lambda d: banks.logits(TEXT[:1], [d]),
        ):
            with pytest.raises(DataError, match="no bank 'news'"):
                call("news")
        with pytest.raises(DataError, match="docs: there are no tokens"):
            banks.fit_keys({"docs": TEXT[:0]})
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        with pytest.raises(OutputError):
            banks.save(tmp_path / "full", base)
