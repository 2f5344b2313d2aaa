"""Checkpoints that lie, are damaged, or want to run code: refused by name, or read for what they
are."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.architectures import lnfree_model, make_model
from support.loaded import live_model
from support.models import make_gpt2, make_tokenizer
from support.published_formats import (
    fake_layer_norm_state,
    finished,
    with_lora,
    write_bin,
    write_nanogpt,
)
from transformers import AutoTokenizer

import lnfree_interp as lf
from lnfree_interp.errors import (
    CheckpointError,
    InexactError,
    LnfreeError,
    NormSiteError,
    OutputError,
    UnsupportedModelError,
)


@pytest.fixture
def native(folded, tmp_path):
    """A folder in TransformerLens' layout."""
    return lf.export(folded, tmp_path / "native", target="transformer_lens")


@pytest.fixture
def native_frozen(folded, tmp_path):
    return lf.export(lf.frozen_form(folded), tmp_path / "frozen", target="transformer_lens")


def edit(folder, *path, value):
    file = folder / "hooked_transformer.json"
    content = json.loads(file.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(content))


def test_no_tokenizer_is_opened_by_name_and_no_code_is_run(native, tmp_path):
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    (native / "tokenizer.json").unlink()
    assert lf.load(native).tokenizer is None
    for field, value in (("tokenizer_name", str(evil)), ("trust_remote_code", True)):
        folder = tmp_path / field
        shutil.copytree(native, folder)
        edit(folder, "config", field, value=value)
        with pytest.raises(CheckpointError, match=f"unknown field {field}"):
            lf.load(folder)
    assert not (tmp_path / "pwned").exists()


def test_remote_code_in_a_config_is_not_run(gpt2_folder, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(gpt2_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    with pytest.raises(LnfreeError):
        lf.load(folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config", "attn_scale"), 1.3),
        (("config", "act_fn"), "relu"),
        (("config", "scale_attn_by_inverse_layer_idx"), True),
    ],
)
def test_an_edited_config_is_caught_by_the_witnesses(path, value, native):
    edit(native, *path, value=value)
    with pytest.raises(InexactError, match="model that was written"):
        lf.load(native)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config", "eps"), -1.0),
        (("config", "eps"), "x"),
        (("config", "n_ctx"), 2**40),
        (("config", "d_vocab"), 2**40),
        (("config", "d_vocab_out"), 2**40),
        (("config", "n_layers"), 2**40),
        (("config", "n_heads"), None),
        (("frozen",), {"ln_final": 1.0}),
        (("frozen",), {"ln_final": "x"}),
        (("logits",), "x"),
        (("tokens",), None),
    ],
    ids=str,
)
def test_a_broken_config_is_named(path, value, native_frozen):
    edit(native_frozen, *path, value=value)
    with pytest.raises(CheckpointError, match=r"hooked_transformer\.json"):
        lf.load(native_frozen)


def test_norms_that_are_not_frozen_any_more_are_caught(native_frozen):
    edit(native_frozen, "frozen", value={})
    with pytest.raises(InexactError):
        lf.load(native_frozen)


def test_weights_that_go_missing_are_named(native):
    weights = load_file(native / "model.safetensors")
    for damage, message in (
        ({"blocks.0.mlp.b_in": None}, r"missing blocks\.0\.mlp\.b_in"),
        ({"blocks.0.attn.W_O": None}, r"missing blocks\.0\.attn\.W_O"),
        ({"embed.W_E": weights["embed.W_E"].int()}, "whole numbers"),
        ({"surprise": torch.ones(1)}, "unexpected surprise"),
    ):
        damaged = {k: v for k, v in (weights | damage).items() if v is not None}
        save_file(damaged, native / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            lf.load(native)


def test_what_was_written_is_compared_with_the_model(folded, tmp_path):
    folded.add_hook("blocks.1.hook_mlp_out", lambda activation, hook: activation * 0)
    with pytest.raises(InexactError, match="what was written"):
        lf.export(folded, tmp_path / "out", target="transformer_lens")
    with pytest.raises(InexactError, match="exported against"):
        lf.export(folded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_llama_ignores_windows_as_transformers_does(tokens):
    hf_model = make_model("llama")
    hf_model.config.sliding_window = 6
    model = lf.load(hf_model)
    assert not model.cfg.use_local_attn
    lf.compare_logits(model, hf_model, tokens).require("llama")


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen2-window"])
def test_the_check_is_long_enough_to_see_the_window(kind):
    hf_model = make_model(kind, max_position_embeddings=512, sliding_window=200)
    model = lf.load(hf_model)
    model.cfg.window_size = 512
    tokens = torch.randint(300, (1, 300), generator=torch.Generator().manual_seed(0))
    assert lf.compare_logits(model, hf_model, tokens).relative > 1e-3
    assert lf.compare_logits(model, hf_model, tokens[:, :128]).relative < 1e-5


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], -1, True, [1, 2], "GPT2LMHeadModel", []])
def test_an_architecture_that_is_not_the_model_types_is_refused(names, gpt2_folder, tmp_path):
    folder = tmp_path / "lie"
    shutil.copytree(gpt2_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": names}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LnfreeError):
        lf.load(folder)


def test_leading_tokens_are_not_taken_for_padding():
    tokenizer = make_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", "<|endoftext|>"
    hf_model = make_gpt2()
    model = lf.load(hf_model, tokenizer=tokenizer)
    tokens = torch.tensor([[0, 0, *range(10, 28)]])
    lf.compare_logits(model, hf_model, tokens).require("leading end-of-text")


@pytest.mark.parametrize("target", ["transformers", "transformer_lens"])
def test_the_tokenizer_goes_out_as_it_came(target, tmp_path):
    """TransformerLens gives it a padding token, and BOS where it has none."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    original = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", padding_side="left")
    original.bos_token = None
    model = lf.load(make_gpt2(), tokenizer=original)
    assert model.tokenizer.pad_token is not None
    assert model.tokenizer.padding_side == "right"
    lf.export(lf.frozen_form(lf.fold(frozen_at_one(model))), tmp_path / "out", target=target)
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (back.pad_token, back.bos_token, back.padding_side) == (None, None, "left")
    assert original.pad_token is None


def frozen_at_one(model, sigma=1.0):
    sites = lf.with_norm_sites(model)
    for site in lf.list_norm_sites(sites):
        lf.freeze_site(sites, site, sigma)
    return sites


@pytest.mark.parametrize("sigma", [1.0, 2.0, 1e-3])
def test_equal_constants_everywhere_come_back(sigma, live, dtype, tmp_path):
    """Norms whose gains all are one number look like folded ones with another epsilon."""
    with torch.no_grad():
        live.unembed.b_U.add_(30 * torch.randn_like(live.b_U))
        live.unembed.W_U.add_(torch.randn_like(live.W_U))
    folded = lf.fold(frozen_at_one(live))
    names = [f"blocks.{i}.{ln}" for i in range(3) for ln in ("ln1", "ln2")]
    frozen = lf.frozen_form(folded, dict.fromkeys([*names, "ln_final"], sigma))
    lf.export(frozen, tmp_path / "out")
    lf.compare_logits(lf.load(tmp_path / "out", dtype=dtype), folded).require("round trip", 1e-5)


def test_epsilon_comes_back_from_the_sidecar_and_from_fake_layer_norms(tmp_path, tokenizer):
    sites = frozen_at_one(lf.load(make_gpt2(layer_norm_epsilon=0.1), tokenizer=tokenizer))
    lf.export(sites, tmp_path / "out")
    assert lf.load(tmp_path / "out", form="sites").cfg.eps == 0.1
    model = finished(layer_norm_epsilon=0.2)
    write_bin(model, fake_layer_norm_state(model), tmp_path / "fake")
    assert lf.load(tmp_path / "fake", form="sites", tokenizer=tokenizer).cfg.eps == 0.2


@pytest.mark.parametrize("lnfree", [False, True])
def test_gemma_stays_tied(lnfree, tmp_path):
    hf_model = lnfree_model("gemma2") if lnfree else make_model("gemma2")
    lf.export(lf.load(hf_model), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_bos_is_prepended_by_default_as_in_transformer_lens():
    for kind, prepends in (("gpt2", True), ("llama", True), ("qwen2", False), ("neox", False)):
        assert live_model(kind, torch.float32).cfg.default_prepend_bos is prepends


def full_disk(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.parametrize("target", ["transformers", "transformer_lens"])
def test_a_full_disk_is_an_output_error(target, folded, tmp_path, monkeypatch):
    monkeypatch.setattr("lnfree_interp.checkpoints.native.save_file", full_disk)
    monkeypatch.setattr("transformers.GPT2LMHeadModel.save_pretrained", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        lf.export(folded, tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []


def test_exports_that_make_no_sense_are_refused(folded, tmp_path):
    for sigma in ({"nonsense": 1.0}, {"ln_final": -1.0}):
        with pytest.raises(NormSiteError):
            lf.export(folded, tmp_path / "out", sigma=sigma)
    assert list(tmp_path.iterdir()) == []


def test_paths_of_this_machine_stay_here(gpt2_folder, tmp_path):
    model = lf.load(gpt2_folder)
    for target in ("transformers", "transformer_lens"):
        folder = lf.export(model, tmp_path / target, target=target)
        for file in folder.glob("*.[jm][sd]*"):
            assert str(gpt2_folder.parent) not in file.read_text()


def test_configs_that_only_change_what_is_returned_do_not_matter():
    hf_model = make_gpt2()
    hf_model.config.return_dict = False
    hf_model.config.use_cache = True
    lf.load(hf_model)


def test_masks_that_old_versions_stored_are_no_weights(tmp_path, tokenizer):
    make_model("neo").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        prefix = f"transformer.h.{layer}.attn.attention"
        weights[f"{prefix}.bias"] = torch.ones(1, 1, 48, 48).tril()
        weights[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lf.load(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "neo", "opt"])
def test_absurd_contexts_are_refused_before_memory_is_taken(kind, tmp_path, tokenizer):
    make_model(kind).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    field = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    (tmp_path / "config.json").write_text(json.dumps(config | {field: 30_000_000}))
    with pytest.raises(CheckpointError, match="the files hold"):
        lf.load(tmp_path)


def test_tensors_that_claim_more_than_they_store_are_refused(tmp_path, tokenizer):
    model = finished()
    write_nanogpt(model, tmp_path / "ckpt.pt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    checkpoint["model"]["_orig_mod.transformer.wte.weight"] = torch.ones(1, 1).expand(10**9, 32)
    checkpoint["model_args"]["vocab_size"] = 10**9
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="the files hold"):
        lf.load(tmp_path / "ckpt.pt", sigma={})
    state = with_lora(model, fake_layer_norm_state(model))
    name = "transformer.h.0.mlp.c_fc.lora_A"
    for A in (
        torch.ones(1, 3),
        torch.ones(3),
        torch.ones(32, 3).int(),
        torch.ones(1, 1).expand(32, 3),
    ):
        write_bin(model, state | {name: A}, tmp_path / "lora")
        with pytest.raises(CheckpointError, match="adapter"):
            lf.load(tmp_path / "lora", tokenizer=tokenizer)


def test_shards_outside_the_folder_are_not_read(tmp_path, tokenizer):
    model = finished()
    write_bin(model, model.state, tmp_path / "in", shards=2)
    shutil.move(tmp_path / "in/pytorch_model-00001-of-00002.bin", tmp_path / "outside.bin")
    index = tmp_path / "in/pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00001-of-00002", "../outside"))
    with pytest.raises(CheckpointError, match="outside the folder"):
        lf.load(tmp_path / "in", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", {"attn_logit_softcapping": 0.0}),
        ("gemma2", {"final_logit_softcapping": -1.0}),
        ("gemma2", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}),
        ("mistral", {"sliding_window": -1}),
        ("neo", {"window_size": 0}),
        ("gpt2", {"is_causal": False}),
        ("gpt2", {"layer_norm_epsilon": -1.0}),
        ("neox", {"head_dim": 16}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}),
        ("llama", {"rms_norm_eps": float("nan")}),
    ],
    ids=str,
)
def test_configs_that_transformers_would_obey_or_choke_on(kind, change):
    hf_model = make_model(kind)
    for name, value in change.items():
        object.__setattr__(hf_model.config, name, value)
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        lf.load(hf_model, check=False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_cannot_be_checked_are_refused(dtype, gpt2_folder):
    with pytest.raises(UnsupportedModelError, match="dtype"):
        lf.load(gpt2_folder, dtype=dtype)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        hf_model = type(make_gpt2())(make_gpt2().config)
    with pytest.raises(CheckpointError, match="meta"):
        lf.load(hf_model)
