"""What goes out is an ordinary Hugging Face folder with the same logits, or nothing."""

import json

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

import lnfree_interp as lf
from lnfree_interp.errors import NormSiteError, OutputError, UnsupportedModelError

TIGHT = {torch.float64: 1e-10, torch.float32: 1e-5}


def test_lnfree_folder_in_plain_transformers(folded, dtype, tmp_path):
    lf.export(folded, tmp_path / "model")
    hf_model = GPT2LMHeadModel.from_pretrained(tmp_path / "model", dtype=dtype)
    # float64: the disguise itself is off by variance / 2e12.
    assert lf.compare_logits(hf_model, folded).relative <= TIGHT[dtype]
    assert hf_model.config.layer_norm_epsilon == 1e12


def test_lnfree_folder_comes_back_folded(folded, dtype, tmp_path):
    lf.export(folded, tmp_path / "model")
    back = lf.load(tmp_path / "model", dtype=dtype)
    assert back.cfg.normalization_type is None
    assert lf.compare_logits(back, folded).relative <= TIGHT[dtype]


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
    with pytest.raises(NormSiteError, match="before the removal or after it"):
        lf.to_transformers(frozen)
    with torch.no_grad():
        folded.blocks[1].mlp.W_in.add_(0.1)
        live.unembed.b_U.add_(1)
    with pytest.raises(UnsupportedModelError, match="W_in reads the mean"):
        lf.to_transformers(folded)
    with pytest.raises(UnsupportedModelError, match="no unembedding bias"):
        lf.to_transformers(live)
