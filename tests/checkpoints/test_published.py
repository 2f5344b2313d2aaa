"""Every published LN-free format comes in with the logits of its own definition, or not at all."""

import pickle
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_tokenizer
from support.published_formats import (
    fake_layer_norm_state,
    finished,
    reference_logits,
    with_lora,
    write_apollo,
    write_bin,
    write_nanogpt,
    write_schaeff,
)
from transformers import GPT2LMHeadModel

import lnfree_interp as lf
from lnfree_interp.errors import CheckpointError, NormSiteError, UnsupportedModelError
from lnfree_interp.numerics import measure_error

GATE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture
def model():
    return finished()


def require_equal(found, model, tokens, dtype):
    with torch.no_grad():
        logits = found(tokens)
    assert logits.dtype == dtype
    assert measure_error(logits.double(), reference_logits(model, tokens)).relative <= GATE[dtype]


def write(kind, model, folder, tokenizer, dtype):
    if kind == "schaeff":
        write_schaeff(model, folder, dtype)
    elif kind == "apollo":
        write_apollo(model, folder, dtype)
    elif kind == "fake":
        write_bin(model, fake_layer_norm_state(model), folder)
    elif kind == "fake-sharded":
        write_bin(model, fake_layer_norm_state(model), folder, shards=3)
    elif kind == "lora":
        write_bin(model, with_lora(model, fake_layer_norm_state(model)), folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("form", ["folded", "frozen"])
@pytest.mark.parametrize("kind", ["schaeff", "apollo", "fake", "fake-sharded", "lora"])
def test_formats_come_in(kind, form, model, tokenizer, tokens, dtype, tmp_path):
    model.state = {name: W.to(dtype) for name, W in model.state.items()}
    write(kind, model, tmp_path / "in", tokenizer, dtype)
    found = lf.load(tmp_path / "in", form=form, dtype=dtype)
    assert lf.live_sites(found) == ()
    assert found.cfg.normalization_type == {"folded": None, "frozen": "LNPre"}[form]
    require_equal(found, model, tokens, dtype)
    if kind in ("schaeff", "apollo"):
        hf_model = GPT2LMHeadModel.from_pretrained(tmp_path / "in", dtype=dtype)
        assert lf.compare_logits(found, hf_model).relative <= GATE[dtype]


@pytest.mark.parametrize("kind", ["fake", "lora"])
def test_constants_of_fake_layer_norms_are_shown(kind, model, tokenizer, tmp_path):
    write(kind, model, tmp_path, tokenizer, torch.float32)
    frozen = lf.load(tmp_path, form="frozen")
    assert frozen.blocks[1].ln1.sigma.item() == pytest.approx(model.sigma["transformer.h.1.ln_1"])
    assert frozen.ln_final.sigma.item() == pytest.approx(model.sigma["transformer.ln_f"])


def apollo_tables(model, first=2.5):
    """The run's two tables, and the constants that they lead to: channel 0 of ln_2 and ln_f."""
    std, std_bos = {}, {}
    last = model.config.n_layer - 1
    for name, sigma in list(model.sigma.items()):
        layer = name.split(".")[2] if ".h." in name else str(last)
        hook = {"ln_1": "pre", "ln_2": "mid", "ln_f": "post"}[name.rpartition(".")[2]]
        key = f"blocks.{layer}.hook_resid_{hook}"
        std[key], std_bos[key] = sigma, sigma * first
        if not name.endswith("ln_1"):
            channels = torch.full((model.config.n_embd,), sigma, dtype=torch.float64)
            channels[0] = sigma * first
            model.sigma[name] = channels
    return std, std_bos


def test_nanogpt_with_its_channel_quirk(tokens, dtype, tmp_path):
    model = finished(activation_function="gelu")
    model.state = {name: W.to(dtype) for name, W in model.state.items()}
    std, std_bos = apollo_tables(model)
    write_nanogpt(model, tmp_path / "ckpt.pt")
    sigma = lf.formats.nanogpt_sigma(std, std_bos, model.config.n_embd)
    for form in ("folded", "frozen"):
        found = lf.load(
            tmp_path / "ckpt.pt", sigma=sigma, form=form, dtype=dtype, tokenizer=make_tokenizer()
        )
        require_equal(found, model, tokens, dtype)
        assert found.to_str_tokens("def")[0] == "<|endoftext|>"
    # Without the quirk it is another model.
    plain = {name: s if s.__class__ is float else s[1].item() for name, s in sigma.items()}
    wrong = lf.load(tmp_path / "ckpt.pt", sigma=plain, dtype=dtype)
    error = measure_error(wrong(tokens).double(), reference_logits(model, tokens))
    assert error.relative > 1e-3


def test_nanogpt_with_live_norms_and_without_biases(tokens, tmp_path):
    model = finished(activation_function="gelu")
    write_nanogpt(model, tmp_path / "ckpt.pt")
    live = lf.load(tmp_path / "ckpt.pt", sigma={})
    assert live.cfg.normalization_type == "LN"
    assert live.cfg.act_fn == "gelu"
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state = checkpoint["model"]
    for name in [name for name in state if name.endswith(".bias")]:
        del state[name]
    torch.save(checkpoint, tmp_path / "no_bias.pt")
    assert not lf.load(tmp_path / "no_bias.pt", sigma={}).b_in.any()


def test_nanogpt_needs_every_constant(model, tmp_path):
    file = tmp_path / "ckpt.pt"
    write_nanogpt(model, file)
    std, std_bos = apollo_tables(model)
    sigma = lf.formats.nanogpt_sigma(std, std_bos, 32)
    with pytest.raises(CheckpointError, match="nanogpt_sigma"):
        lf.load(file)
    with pytest.raises(NormSiteError, match=r"no sigma for blocks\.1\.ln2"):
        lf.load(file, sigma={name: s for name, s in sigma.items() if name != "blocks.1.ln2"})
    with pytest.raises(NormSiteError, match=r"blocks\.7\.ln1"):
        lf.load(file, sigma=sigma | {"blocks.7.ln1": 1.0})
    with pytest.raises(NormSiteError, match="positive"):
        lf.load(file, sigma=sigma | {"blocks.0.ln1": -1.0})
    with pytest.raises(NormSiteError, match=r"shape \[3\]"):
        lf.load(file, sigma=sigma | {"blocks.0.ln2": torch.ones(3)})
    with pytest.raises(NormSiteError, match=r"hook_resid_mid"):
        lf.formats.nanogpt_sigma(
            {k: v for k, v in std.items() if "1.hook_resid_mid" not in k}, std_bos, 32
        )
    torch.save({"model": 3}, file)
    with pytest.raises(CheckpointError, match="not a nanoGPT checkpoint"):
        lf.load(file, sigma=sigma)


@pytest.mark.parametrize(
    ("buffer", "value", "message"),
    [
        ("transformer.h.1.ln_2.is_fake", False, r"h\.1\.ln_2\.is_fake is false"),
        ("transformer.h.0.ln_1.attn_v_is_fake", False, r"attn_v_is_fake is false"),
        ("transformer.ln_f.is_fake", False, r"ln_f\.is_fake is false"),
        ("transformer.h.0.ln_2.average_std_buffer", 9.0, "index 0 are divided by another"),
        ("transformer.h.0.ln_1.bos_std_buffer", 9.0, "end-of-text tokens are divided by another"),
    ],
)
def test_unfinished_fake_layer_norms_are_refused(
    buffer, value, message, model, tokenizer, tmp_path
):
    state = fake_layer_norm_state(model)
    if isinstance(value, bool):
        state[buffer] = torch.tensor(value)
    else:
        state[buffer] = state[buffer].clone()
        state[buffer][0] = value
    write_bin(model, state, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        lf.load(tmp_path)


def test_a_fake_layer_norm_without_its_flag_is_refused(model, tokenizer, tmp_path):
    state = fake_layer_norm_state(model)
    del state["transformer.h.0.ln_2.is_fake"]
    write_bin(model, state, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no is_fake"):
        lf.load(tmp_path)


def test_partly_removed_norms_are_refused(model, tokenizer, tmp_path):
    write_schaeff(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.ln_2.weight"
    weights[name] = model.state[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of 7 norms are not removed.*blocks\.1\.ln2"):
        lf.load(tmp_path)


@pytest.mark.parametrize("epsilon", [1e-5, 1.0, 1e5, 1e10])
def test_an_epsilon_that_does_not_fit_is_refused(epsilon, model, tokenizer, tmp_path):
    write_apollo(model, tmp_path, epsilon=epsilon)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"epsilon (of )?{re.escape(f'{epsilon:g}')}"):
        lf.load(tmp_path)


def test_a_lost_epsilon_is_refused(model, tokenizer, tmp_path):
    """What HookedTransformer.from_pretrained does unnoticed: normalise, then scale by 1e6."""
    write_schaeff(model, tmp_path, epsilon=1e-5)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has lost its epsilon of 1e12"):
        lf.load(tmp_path)


def test_an_adapter_without_its_half_is_refused(model, tokenizer, tmp_path):
    state = with_lora(model, fake_layer_norm_state(model))
    del state["transformer.h.0.mlp.c_fc.lora_B"]
    write_bin(model, state, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"c_fc lacks .*lora_B"):
        lf.load(tmp_path)


def test_plain_pickles_load_too(gpt2_folder, model, tokenizer, tokens, tmp_path):
    write_bin(model, model.state, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lf.compare_logits(lf.load(tmp_path), lf.load(gpt2_folder), tokens).require("same", 0.0)


class Hostile:
    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_hostile_pickles_are_refused(kind, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bin(model, model.state, tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    content = {"transformer.wte.weight": Hostile(), "model": Hostile()}
    for file in (tmp_path / "in/pytorch_model.bin", tmp_path / "ckpt.pt"):
        if kind == "torch":
            torch.save(content, file)
        else:
            file.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="refused: the pickle"):
        lf.load(tmp_path / "in")
    with pytest.raises(CheckpointError, match="refused: the pickle"):
        lf.load(tmp_path / "ckpt.pt", sigma={})
    assert not (tmp_path / "pwned").exists()


def test_damaged_pickles_are_named(model, tokenizer, tmp_path):
    write_bin(model, model.state, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    whole = file.read_bytes()
    for content in (whole[:-2000], b"", b"not a pickle", whole[:100]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            lf.load(tmp_path)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="not a state dict"):
        lf.load(tmp_path)


def test_missing_shards_are_named(model, tokenizer, tmp_path):
    write_bin(model, model.state, tmp_path, shards=3)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.bin, which is missing"):
        lf.load(tmp_path)


def test_float16_is_refused(model, tokenizer, tmp_path):
    write_bin(model, fake_layer_norm_state(model), tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="overflow float16"):
        lf.load(tmp_path, dtype=torch.float16)


def test_training_checkpoints_have_no_tokenizer(model, tokens, tokenizer, tmp_path):
    write_bin(model, fake_layer_norm_state(model), tmp_path)
    with pytest.raises(CheckpointError, match="pass tokenizer="):
        lf.load(tmp_path)
    found = lf.load(tmp_path, tokenizer=tokenizer)
    require_equal(found, model, tokens, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.to_str_tokens("def")[0] == "<|endoftext|>"
