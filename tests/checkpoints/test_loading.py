"""A checkpoint comes in with the same logits, or is refused with the reason."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_gpt2, make_tokenizer
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, GPT2LMHeadModel

import lnfree_interp as lf
from lnfree_interp.checkpoints import architectures, hub
from lnfree_interp.checkpoints.loading import config_of
from lnfree_interp.errors import (
    CheckpointError,
    InexactError,
    LnfreeError,
    NormSiteError,
    UnsupportedModelError,
)
from lnfree_interp.numerics import TOLERANCE

TIGHT = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"n_head": 2, "n_layer": 1},
        {"n_inner": 40},
        {"layer_norm_epsilon": 0.1},
        {"activation_function": "relu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"tie_word_embeddings": False},
    ],
    ids=lambda config: ",".join(f"{k}={v}" for k, v in config.items()) or "plain",
)
def test_logits_equal_transformers(config, dtype):
    hf_model = make_gpt2(**config).to(dtype)
    model = lf.load(hf_model, dtype=dtype)
    assert lf.compare_logits(model, hf_model).relative <= TIGHT[dtype]


def test_folder_gives_unprocessed_weights_and_its_tokenizer(gpt2_folder):
    model = lf.load(gpt2_folder, dtype=torch.float64)
    hf_model = GPT2LMHeadModel.from_pretrained(gpt2_folder, dtype=torch.float64)
    assert model.cfg.normalization_type == "LN"
    assert torch.equal(model.W_E, hf_model.transformer.wte.weight)
    assert torch.equal(model.W_U, hf_model.lm_head.weight.T)
    assert torch.equal(model.blocks[1].ln1.w, hf_model.transformer.h[1].ln_1.weight)
    assert torch.equal(model.b_out[2], hf_model.transformer.h[2].mlp.c_proj.bias)
    assert model.to_string(model.to_tokens("return self", prepend_bos=False)[0]) == "return self"


def test_wrong_epsilon_is_caught(gpt2_folder, monkeypatch):
    right = architectures.ARCHITECTURES["GPT2LMHeadModel"]
    config = replace(right.config, to_hooked=lambda hf: right.config.to_hooked(hf) | {"eps": 1e-3})
    wrong = replace(right, config=config)
    monkeypatch.setitem(architectures.ARCHITECTURES, "GPT2LMHeadModel", wrong)
    with pytest.raises(InexactError, match="against transformers"):
        lf.load(gpt2_folder)
    assert lf.load(gpt2_folder, check=False).cfg.eps == 1e-3


def copy_without(folder, tmp_path, *names):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in names:
        for file in copy.glob(name):
            file.unlink()
    return copy


def copy_with_config(folder, tmp_path, **changes):
    copy = copy_without(folder, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_missing_files_are_named(gpt2_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        lf.load(copy_without(gpt2_folder, tmp_path / "a", "config.json"))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        lf.load(copy_without(gpt2_folder, tmp_path / "b", "*.safetensors"))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        lf.load(copy_without(gpt2_folder, tmp_path / "c", "tokenizer*"))
    with pytest.raises(CheckpointError, match="no such folder"):
        lf.load(tmp_path / "nowhere")


def test_broken_files_are_refused(gpt2_folder, tmp_path):
    folder = copy_without(gpt2_folder, tmp_path / "truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="weights cannot be loaded"):
        lf.load(folder)

    folder = copy_without(gpt2_folder, tmp_path / "json")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        lf.load(folder)

    folder = copy_without(gpt2_folder, tmp_path / "missing")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.bias"):
        lf.load(folder)


def test_weights_that_the_config_has_no_place_for_are_refused(gpt2_folder, tmp_path):
    """A config that lies about the number of layers would otherwise drop the rest unnoticed."""
    folder = copy_with_config(gpt2_folder, tmp_path, n_layer=2)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.2\..*no place"):
        lf.load(folder)


def test_the_oldest_gpt2_layout_loads(gpt2_folder, tmp_path):
    """Like the hub's own `gpt2`: no `transformer.` prefix, causal masks stored as weights."""
    folder = copy_without(gpt2_folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(3):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    lf.compare_logits(lf.load(folder), lf.load(gpt2_folder)).require("old layout", 0.0)


def test_shards_load_and_a_missing_one_is_named(tmp_path, tokenizer, gpt2_folder):
    folder = tmp_path / "sharded"
    make_gpt2().save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    lf.compare_logits(lf.load(folder), lf.load(gpt2_folder)).require("shards", 0.0)
    shards[1].rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"names {shards[1].name}, which is missing"):
        lf.load(folder)
    (folder / "elsewhere").rename(shards[1])
    shards[2].write_bytes(shards[2].read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"{shards[2].name}: .*damaged or truncated"):
        lf.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not an index of shards"):
        lf.load(folder)


def test_a_weight_of_another_shape_is_named(gpt2_folder, tmp_path):
    folder = copy_without(gpt2_folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.bias"] = torch.zeros(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"h\.1\.mlp\.c_fc\.bias has shape \[7\], config\.json says \[128\]"
    with pytest.raises(CheckpointError, match=message):
        lf.load(folder)


def test_a_config_of_a_giant_is_refused_before_it_is_built(gpt2_folder, tmp_path):
    """Building it would take all memory there is."""
    folder = copy_with_config(gpt2_folder, tmp_path, n_embd=40_000, n_layer=900)
    with pytest.raises(CheckpointError, match=r"config\.json describes at least .* the files hold"):
        lf.load(folder)


def make_cache(root, gpt2_folder, revisions):
    """A hub cache as huggingface_hub lays it out."""
    repo = root / "models--someone--small-gpt2"
    (repo / "refs").mkdir(parents=True)
    for revision, seed in revisions.items():
        commit = f"{seed:040x}"
        (repo / "refs" / revision).write_text(commit)
        snapshot = repo / "snapshots" / commit
        shutil.copytree(gpt2_folder, snapshot)
        make_gpt2(seed).save_pretrained(snapshot)
    return root


def test_hub_ids_come_from_the_cache_offline(gpt2_folder, tmp_path):
    cache = make_cache(tmp_path / "cache", gpt2_folder, {"main": 0, "later": 3})
    first = lf.load("someone/small-gpt2", cache_dir=cache)
    later = lf.load("someone/small-gpt2", cache_dir=cache, revision="later")
    lf.compare_logits(first, make_gpt2(0)).require("main")
    lf.compare_logits(later, make_gpt2(3)).require("later")
    assert first.cfg.model_name == "someone/small-gpt2"
    with pytest.raises(CheckpointError, match="cannot be reached"):
        lf.load("someone/small-gpt2", cache_dir=cache, revision="never")
    with pytest.raises(CheckpointError, match="cannot be reached"):
        lf.load("someone/small-gpt2", cache_dir=tmp_path / "empty")


def test_a_half_downloaded_model_is_not_taken_for_whole(gpt2_folder, tmp_path):
    cache = make_cache(tmp_path / "cache", gpt2_folder, {"main": 0})
    for file in cache.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="cannot be reached"):
        lf.load("someone/small-gpt2", cache_dir=cache)
    assert (
        hub.locate("someone/small-gpt2", cache_dir=cache, weights=False) / "config.json"
    ).is_file()


def test_what_another_program_fetched_is_not_taken_for_whole(gpt2_folder, tmp_path, monkeypatch):
    """Weights without a tokenizer: the hub is asked; where it cannot be reached they may do."""
    cache = make_cache(tmp_path / "cache", gpt2_folder, {"main": 0})
    for file in cache.rglob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        lf.load("someone/small-gpt2", cache_dir=cache)
    model = lf.load("someone/small-gpt2", cache_dir=cache, tokenizer=make_tokenizer())
    lf.compare_logits(model, make_gpt2(0)).require("main")
    nothing = type("Info", (), {"siblings": ()})
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *arguments, **more: nothing)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **more: str(gpt2_folder))
    assert hub.locate("someone/small-gpt2", cache_dir=cache) == gpt2_folder


def test_only_what_is_needed_is_downloaded(monkeypatch, gpt2_folder):
    """Of a repository that has its weights in five formats: safetensors, else pickles."""
    asked = {}

    class Info:
        siblings = ()

    def model_info(self, name, *, revision, timeout):
        Info.siblings = [type("File", (), {"rfilename": name}) for name in files]
        return Info

    def snapshot_download(name, *, allow_patterns, ignore_patterns, revision, cache_dir):
        from huggingface_hub.utils import filter_repo_objects

        kept = filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked["files"] = set(kept)
        return str(gpt2_folder)

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    common = {"config.json", "tokenizer.json", "merges.txt", "vocab.json"}
    others = ["tf_model.h5", "onnx/x.onnx", "rust_model.ot", "64.tflite", "flax_model.msgpack"]
    others += ["pytorch_model.bin", "original/model.safetensors"]
    files = [*common, "model.safetensors", *others]
    lf.load("someone/gpt2")
    assert asked["files"] == common | {"model.safetensors"}
    files = [*common, "pytorch_model.bin", "modeling_evil.py"]
    lf.load("someone/gpt2")
    assert asked["files"] == common | {"pytorch_model.bin"}
    assert config_of("someone/gpt2").n_layers == 3
    assert asked["files"] == {"config.json"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_passes_through(gpt2_folder, dtype):
    model = lf.load(gpt2_folder, dtype=dtype)
    assert {W.dtype for W in model.parameters()} == {dtype}
    assert model.cfg.dtype == dtype


def test_loading_a_model_in_memory_leaves_it_alone(dtype):
    hf_model = make_gpt2().to(dtype)
    before = {name: W.clone() for name, W in hf_model.state_dict().items()}
    model = lf.load(hf_model, dtype=dtype)
    with torch.no_grad():
        for W in model.parameters():
            W.add_(1)
    for name, W in hf_model.state_dict().items():
        assert torch.equal(W, before[name]), name


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64], ids=str)
def test_a_model_in_memory_may_have_another_dtype(given, wanted):
    """As transformers makes it by default: that of the file."""
    model = lf.load(make_gpt2().to(given), dtype=wanted)
    assert model.cfg.dtype == wanted
    assert lf.measured_agreement(model).dtype == max((given, wanted), key=TOLERANCE.get)


@pytest.mark.parametrize("written", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64], ids=str)
def test_a_folder_may_be_opened_in_another_dtype(gpt2_folder, tmp_path, written, wanted):
    model = lf.load(gpt2_folder, dtype=written)
    lf.export(model, tmp_path / "out", target="transformer_lens")
    again = lf.load(tmp_path / "out", dtype=wanted)
    assert again.cfg.dtype == wanted
    assert torch.equal(again.W_E, model.W_E.to(wanted))


def test_a_tokenizer_of_another_model_is_refused_in_either_layout(gpt2_folder, tmp_path):
    lf.export(lf.load(gpt2_folder), tmp_path / "out", target="transformer_lens")
    other = make_tokenizer()
    other.add_tokens([f"<{i}>" for i in range(30)])
    with pytest.raises(CheckpointError, match="do not belong together"):
        lf.load(tmp_path / "out", tokenizer=other)


def test_a_form_that_does_not_exist_is_refused(live, gpt2_folder):
    with pytest.raises(NormSiteError, match="its norms are live"):
        lf.load(gpt2_folder, form="frozen")


@pytest.mark.parametrize(
    "name", ["bad thing", "a..b", "gpt2/", "foo--bar", "é", "x" * 200, "a/b/c"]
)
def test_names_that_are_neither_folder_nor_hub_id(name):
    with pytest.raises(CheckpointError):
        lf.load(name)


def test_a_file_is_not_a_checkpoint(gpt2_folder):
    with pytest.raises(CheckpointError, match="pass a folder"):
        lf.load(gpt2_folder / "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"n_embd": "x"},
        {"layer_norm_epsilon": None},
        {"dtype": "foo"},
        {"n_head": -4},
        {"vocab_size": 299},
        {"add_cross_attention": True},
        {"activation_function": "mish"},
    ],
    ids=str,
)
def test_configs_that_lie_are_refused(gpt2_folder, tmp_path, change):
    folder = copy_with_config(gpt2_folder, tmp_path, **change)
    with pytest.raises(LnfreeError):
        lf.load(folder)


def test_float16_is_refused_where_it_overflows(folded, tmp_path):
    lf.export(folded, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="overflow float16"):
        lf.load(tmp_path / "model", dtype=torch.float16)


def test_added_tokens_survive_and_encodings_have_no_bos(gpt2_folder):
    """TransformerLens would reopen the tokenizer from its folder, without what was added since."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    short = make_gpt2(vocab_size=320)
    tokenizer.add_tokens(["foo_bar"])
    model = lf.load(short, tokenizer=tokenizer)
    assert model.to_str_tokens("foo_bar") == ["<|endoftext|>", "foo_bar"]
    assert model.to_tokens("foo_bar", prepend_bos=False).shape == (1, 1)


def test_nan_weights_are_refused():
    hf_model = make_gpt2()
    with torch.no_grad():
        hf_model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(
        CheckpointError,
        match=r"transformer\.h\.0\.mlp\.c_fc\.weight holds values that are not finite",
    ):
        lf.load(hf_model)


def test_config_that_does_not_divide_is_refused(gpt2_folder, tmp_path):
    folder = copy_with_config(gpt2_folder, tmp_path, n_head=5)
    with pytest.raises(CheckpointError, match="divisible"):
        lf.load(folder)


def test_tokenizer_of_another_model_is_refused(gpt2_folder):
    other = make_tokenizer()
    other.add_tokens([f"<{i}>" for i in range(30)])
    with pytest.raises(CheckpointError, match="do not belong together"):
        lf.load(gpt2_folder, tokenizer=other)


def test_model_and_tokenizer_in_memory():
    model = lf.load(make_gpt2(), tokenizer=make_tokenizer())
    assert model.to_str_tokens("return")[0] == "<|endoftext|>"
    assert model.to_tokens("return")[0, 1:].tolist() == make_tokenizer()("return")["input_ids"]


def test_unknown_architecture_is_refused_by_name(tmp_path, tokenizer):
    config = BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"BloomForCausalLM.*GPT2LMHeadModel"):
        lf.load(tmp_path)


def test_unreachable_hub_names_the_offline_ways(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub.HfApi, "model_info", no_network)
    with pytest.raises(CheckpointError, match=r"cannot be reached; pass a local folder"):
        lf.load("openai-community/no-such-model")
