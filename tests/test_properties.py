"""Whatever the architecture, its sizes, ties and biases: in and out without a change."""

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from support.architectures import CONFIGS, lnfree_model, make_model
from support.models import freeze_all
from transformers import GPT2LMHeadModel

import lnfree_interp as lf
from lnfree_interp.checkpoints.architectures import ARCHITECTURES, hooked_config
from lnfree_interp.checkpoints.layouts import optional_names, to_hf_weights, to_hooked_weights

MANY = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def sizes(draw, kinds=tuple(CONFIGS)):
    """A kind of model and the settings that make it another size."""
    kind = draw(st.sampled_from(kinds))
    heads, d_head = draw(st.integers(1, 4)), 4 * draw(st.integers(1, 3))
    layers, d_mlp = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    vocab = draw(st.integers(12, 60))
    tie = draw(st.booleans())
    common = {"vocab_size": vocab, "tie_word_embeddings": tie, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        more = {"n_embd": heads * d_head, "n_head": heads, "n_layer": layers, "n_inner": d_mlp}
    elif kind.startswith("neo") and "neox" not in kind:
        local = draw(
            st.lists(st.sampled_from(["local", "global"]), min_size=layers, max_size=layers)
        )
        more = {
            "hidden_size": heads * d_head, "num_heads": heads, "num_layers": layers,
            "intermediate_size": d_mlp, "attention_types": [[[one], 1] for one in local],
            "window_size": draw(st.integers(1, 12)),
        }  # fmt: skip
    else:
        more = {
            "hidden_size": heads * d_head, "num_attention_heads": heads,
            "num_hidden_layers": layers, "intermediate_size": d_mlp,
        }  # fmt: skip
        if kind.startswith("opt"):
            more = {**more, "ffn_dim": more.pop("intermediate_size"), "word_embed_proj_dim": None}
            more["enable_bias"] = draw(st.booleans())
        elif kind.startswith("neox"):
            more["use_parallel_residual"] = draw(st.booleans())
            more["attention_bias"] = draw(st.booleans())
        else:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            more |= {"head_dim": d_head, "num_key_value_heads": draw(st.sampled_from(divisors))}
            more["hidden_size"] = heads * draw(st.integers(4, 12))  # transformers insists
            if kind.startswith(("llama", "qwen3", "gemma")):
                more["attention_bias"] = draw(st.booleans())
            if kind.startswith(("mistral", "gemma")):
                more["sliding_window"] = draw(st.integers(1, 12))
    if kind.startswith("opt"):
        common["pad_token_id"] = 1
    note(f"{kind} {common | more}")
    return kind, common | more


def same_logits(model, hf_model):
    tokens = torch.randint(hf_model.config.vocab_size, (2, 16))
    error = lf.compare_logits(model, hf_model, tokens)
    error.require("logits", 1e-5)


@MANY
@given(sizes())
def test_live_models_come_in_and_go_out(drawn):
    kind, config = drawn
    hf_model = make_model(kind, **config)
    model = lf.load(hf_model, check=False)
    same_logits(model, hf_model)
    same_logits(model, lf.formats.to_transformers(model))


@MANY
@given(sizes())
def test_layouts_are_invertible_bit_by_bit(drawn):
    kind, config = drawn
    hf_model = make_model(kind, **config).double()
    name = type(hf_model).__name__
    cfg = hooked_config(hf_model.config, name, torch.float64, torch.device("cpu"), name)
    layout = ARCHITECTURES[name].layout
    state = hf_model.state_dict()
    weights = to_hooked_weights(layout, cfg, dict(state), name)
    absent = frozenset(optional_names(layout, cfg)) - set(state)
    back = to_hf_weights(layout, cfg, weights, absent)
    assert back.keys() == state.keys()
    for key, W in back.items():
        if "embed_positions" in key:  # OPT's first two rows have no meaning
            assert torch.equal(W[2:], state[key][2:])
        elif kind.startswith("gemma"):  # gains minus one, a scaled embedding
            assert torch.allclose(W, state[key], rtol=1e-15, atol=1e-15)
        else:
            assert torch.equal(W, state[key]), key


@MANY
@given(sizes([kind for kind in CONFIGS if not kind.startswith("opt")]))
def test_lnfree_models_come_in_in_both_forms(drawn):
    kind, config = drawn
    hf_model = lnfree_model(kind, **config)
    folded = lf.load(hf_model, check=False)
    frozen = lf.load(hf_model, check=False, form="frozen")
    same_logits(folded, hf_model)
    same_logits(frozen, hf_model)
    assert lf.live_sites(folded) == lf.live_sites(frozen) == ()


@MANY
@given(sizes(["gpt2", "neox", "neox-sequential", "opt", "neo"]), st.booleans())
def test_norm_conversions_are_exact(drawn, drop):
    kind, config = drawn
    model = lf.load(make_model(kind, **config).double(), dtype=torch.float64, check=False)
    conversion = lf.to_crms(model, "drop" if drop else "orthonormal")
    assert conversion.error.relative <= 1e-10


@settings(MANY, max_examples=10)
@given(sizes(["gpt2"]), st.sampled_from(["transformers", "transformer_lens"]))
def test_folding_and_exporting_change_nothing(drawn, target):
    kind, config = drawn
    live = lf.load(make_model(kind, **config).double(), dtype=torch.float64, check=False)
    sites = lf.with_norm_sites(live)
    for i, site in enumerate(lf.list_norm_sites(sites)):
        lf.freeze_site(sites, site, 0.5 + 0.1 * i)
    folded = lf.fold(sites)
    with tempfile.TemporaryDirectory() as scratch:
        lf.export(folded, Path(scratch) / "out", target=target)
        # No tokenizer was exported, as there was none.
        if target == "transformer_lens":
            back = lf.load(Path(scratch) / "out", dtype=torch.float64)
        else:
            folder = Path(scratch) / "out"
            hf_model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64)
            back = lf.load(hf_model, dtype=torch.float64)
    assert lf.compare_logits(back, sites).relative <= 1e-9


@MANY
@given(
    sizes([kind for kind in CONFIGS if kind != "gemma2"]),  # its caps are not linear
    st.lists(st.integers(0, 11), min_size=2, max_size=12),
    st.sampled_from(["folded", "frozen"]),
)
def test_every_analysis_adds_up(drawn, tokens, form):
    kind, config = drawn
    live = lf.load(make_model(kind, **config), check=False, dtype=torch.float64)
    model = lf.fold(freeze_all(live))
    model = model if form == "folded" else lf.frozen_form(model)
    certificates = lf.certify(model, torch.tensor(tokens))
    failing = [str(one) for one in certificates if not one.error.relative <= 1e-10]
    assert not failing, failing
