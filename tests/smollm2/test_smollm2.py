"""A real model in a real GGUF file: it comes in, predicts what it should, and goes out."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lnfree_interp as lf

pytestmark = pytest.mark.smollm2

EIFFEL = "The Eiffel Tower is in"
IOI = "When Mary and John went to the store, John gave a drink to"


def top(model, prompt, k=3):
    """The most probable next tokens and their logits."""
    values, ids = model(prompt, prepend_bos=False)[0, -1].topk(k)
    return dict(zip(map(model.tokenizer.decode, ids.tolist()), values.tolist(), strict=True))


def test_the_quantisation_is_named(loaded):
    assert loaded.format == "GGUF, quantised Q4_1, dequantised to float32"


def test_the_shape_is_smollm2s(smollm2):
    cfg = smollm2.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_key_value_heads) == (30, 576, 9, 3)
    assert (cfg.d_mlp, cfg.d_vocab, cfg.rotary_base) == (1536, 49152, 100_000)
    assert len(lf.list_norm_sites(smollm2)) == 91
    assert torch.equal(smollm2.W_U, smollm2.W_E.T)


def test_the_logits_are_those_of_transformers(loaded):
    file = lf.smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    tokens = loaded.model.to_tokens(IOI)
    lf.compare_logits(loaded.model, theirs, tokens).require("on text", 1e-5)
    assert 0 < loaded.error.relative < 1e-5


def test_paris_follows(smollm2):
    found = top(smollm2, EIFFEL)
    assert list(found) == [" Paris", " fact", " the"]
    assert found[" Paris"] == pytest.approx(15.2, abs=0.05)


def test_the_indirect_object_follows(smollm2):
    found = top(smollm2, IOI, k=50)
    assert list(found)[:2] == [" Mary", " the"]
    assert found[" Mary"] == pytest.approx(11.0, abs=0.05)
    assert found[" Mary"] - found[" John"] == pytest.approx(6.1, abs=0.1)


def test_an_export_comes_back_in_transformers_and_here(smollm2, tmp_path):
    folder = lf.export(smollm2, tmp_path / "out", source="SmolLM2-135M-Instruct")
    said = "GGUF, quantised Q4_1, dequantised to float32"
    assert said in (folder / "README.md").read_text()
    assert lf.formats.read_sidecar(folder).weights == said
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = smollm2.to_tokens(EIFFEL, prepend_bos=False)
    lf.compare_logits(theirs, smollm2, tokens).require("transformers", 1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(IOI) == smollm2.to_tokens(IOI, prepend_bos=False)[0].tolist()
    back = lf.load(folder)
    assert torch.equal(back.W_Q, smollm2.W_Q)
    assert next(iter(top(back, IOI))) == " Mary"
