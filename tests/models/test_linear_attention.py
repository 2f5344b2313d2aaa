"""Causal linear attention: its forms agree, its hooks see what it computes, its layout is kept."""

import pytest
import torch
from support.architectures import CONFIGS
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.errors import NormSiteError, UnsupportedModelError
from lnfree_interp.models.inserting import lay_out, layout_of
from lnfree_interp.models.linear_attention import FEATURE_MAPS, causal_product

KINDS = [kind for kind in CONFIGS if kind != "gemma2"]  # its scores have a soft cap
DIVISORS = ["sum", "count"]


def linear(kind, layers=None, **settings):
    return lf.to_linear_attention(live_model(kind), layers, **settings).model


def tokens_for(model, batch=2, pos=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.cfg.d_vocab, (batch, pos), generator=generator)


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
def test_the_recurrent_the_chunked_and_the_parallel_form_agree(chunk):
    torch.manual_seed(0)
    q, k, v = (torch.rand(2, 20, 3, d, dtype=torch.float64) for d in (5, 5, 4))
    found = causal_product(q, k, v, chunk)
    state = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    for t in range(20):
        state += k[:, t, :, :, None] * v[:, t, :, None]
        by_hand = (q[:, t, :, None] @ state)[:, :, 0]
        assert (found[:, t] - by_hand).abs().max() < 1e-12
    weights = torch.einsum("bqhf,bkhf->bhqk", q, k).tril()
    parallel = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    assert (found - parallel).abs().max() < 1e-12


def test_no_token_reads_a_later_one_in_any_form():
    torch.manual_seed(0)
    q, k, v = (torch.rand(1, 9, 1, 3, dtype=torch.float64) for _ in range(3))
    changed = v.clone()
    changed[:, 5:] += 1
    for chunk in (1, 4, 9):
        before, after = causal_product(q, k, v, chunk), causal_product(q, k, changed, chunk)
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divide_by", DIVISORS)
@pytest.mark.parametrize("feature_map", list(FEATURE_MAPS))
def test_both_ways_of_a_model_are_the_weights_by_hand(kind, divide_by, feature_map):
    model = linear(kind, divide_by=divide_by, feature_map=feature_map)
    tokens = tokens_for(model)
    state = model(tokens)
    by_pairs, cache = model.run_with_cache(tokens)
    assert (state - by_pairs).abs().max() < 1e-10 * by_pairs.abs().max()
    layer, cfg = 1, model.cfg
    rotary = cfg.positional_embedding_type == "rotary"
    q, k = (cache[f"rot_{x}" if rotary else x, layer] for x in "qk")
    if cfg.use_qk_norm and not rotary:
        pytest.skip("no architecture here has norms on queries without rotation")
    k = k.repeat_interleave(cfg.n_heads // k.shape[2], dim=2)

    def features(x):
        if feature_map == "elu":
            return torch.where(x > 0, x + 1, x.exp())
        both = torch.cat([x, -x], -1).exp()
        return both / both.sum(-1, keepdim=True)

    weights = torch.einsum("bqhf,bkhf->bhqk", features(q), features(k)).tril()
    n = tokens.shape[1]
    behind = torch.arange(n)[:, None] - torch.arange(n)
    seen = behind >= 0
    if model.blocks[layer].attn.attn_type == "local":
        seen = seen & (behind < cfg.window_size)
    weights = weights * seen
    divisor = weights.sum(-1) if divide_by == "sum" else seen.sum(-1).double()
    by_hand = weights / divisor[..., None]
    assert (cache["pattern", layer] - by_hand).abs().max() < 1e-12
    assert (cache["attn_scores", layer] - weights).abs().max() < 1e-12 * weights.max()
    v = cache["v", layer]
    v = v.repeat_interleave(cfg.n_heads // v.shape[2], dim=2)
    z = torch.einsum("bhqk,bkhd->bqhd", by_hand, v)
    assert (cache["z", layer] - z).abs().max() < 1e-11


@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped", "neo"])
@pytest.mark.parametrize("divide_by", DIVISORS)
def test_padding_and_a_cache_of_keys_do_not_change_a_prompt(kind, divide_by):
    stock = live_model(kind, tokenizer=True)
    model = lf.to_linear_attention(stock, [0, 2], divide_by=divide_by).model
    tokens = tokens_for(model, batch=1)
    whole = model(tokens)
    padded = torch.cat([torch.zeros_like(tokens[:, :3]), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3)[None].long()
    assert (model(padded, attention_mask=mask)[:, 3:] - whole).abs().max() < 1e-10
    settings = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    cached = model.generate(tokens, use_past_kv_cache=True, **settings)
    assert torch.equal(cached, model.generate(tokens, use_past_kv_cache=False, **settings))


def test_gradients_are_the_same_both_ways():
    model = linear("llama-grouped", divide_by="sum")
    tokens = tokens_for(model)
    model(tokens, return_type="loss").backward()
    by_state = {name: W.grad.clone() for name, W in model.named_parameters() if W.grad is not None}
    model.zero_grad()
    hooks = [(f"blocks.{i}.attn.hook_pattern", lambda x, hook: None) for i in range(3)]
    model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks).backward()
    for name, W in model.named_parameters():
        if name in by_state:
            assert (W.grad - by_state[name]).abs().max() < 1e-12, name
    assert by_state["blocks.0.attn.W_Q"].abs().max() > 0


@pytest.mark.parametrize("split", ["use_split_qkv_input", "use_attn_in", "use_attn_result"])
def test_transformer_lens_options_change_nothing(split):
    model = linear("gpt2", [1], divide_by="count")
    tokens = tokens_for(model)
    before = model(tokens)
    getattr(model, f"set_{split}")(True)
    assert (model(tokens) - before).abs().max() < 1e-12


def test_sums_are_taken_in_float32_under_autocast():
    model = linear("gpt2", divide_by="sum").float()
    tokens = tokens_for(model, pos=48)
    exact = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(tokens)
        z = model.run_with_cache(tokens)[1]["z", 0]
    assert z.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_layout_builds_the_same_attention():
    model = lf.to_linear_attention(
        lf.to_dyt(live_model("gpt2")).model, [0, 2], feature_map="softmax", divide_by="count"
    ).model
    layout = layout_of(model)
    assert layout["blocks.2.attn"] == {"feature_map": "softmax", "divide_by": "count"}
    assert "blocks.1.attn" not in layout
    again = lf.with_norm_sites(live_model("gpt2"))
    lay_out(again, layout)
    assert layout_of(again) == layout
    with pytest.raises(NormSiteError, match=r"blocks\.0\.mlp is no attention"):
        lay_out(again, layout | {"blocks.0.mlp": layout["blocks.0.attn"]})


def test_what_cannot_be_linear_is_refused_by_name():
    model = live_model("gpt2")
    with pytest.raises(UnsupportedModelError, match="at least one block"):
        lf.to_linear_attention(model, [])
    with pytest.raises(UnsupportedModelError, match="block 1 was given more than once"):
        lf.to_linear_attention(model, [1, 1])
    with pytest.raises(NormSiteError, match="there is no block 3: the model has 3 layers"):
        lf.to_linear_attention(model, [3])
    with pytest.raises(NormSiteError, match="feature_map='relu'; choices: elu, softmax"):
        lf.to_linear_attention(model, feature_map="relu")
    with pytest.raises(NormSiteError, match="divide_by='mean'; choices: sum, count"):
        lf.to_linear_attention(model, divide_by="mean")
    with pytest.raises(UnsupportedModelError, match="the attention of block 0 is linear already"):
        lf.to_linear_attention(lf.to_linear_attention(model, [0]).model)
    with pytest.raises(UnsupportedModelError, match="soft cap"):
        lf.to_linear_attention(live_model("gemma2"))
    mixed = lf.to_linear_attention(model, [0]).model
    x = torch.zeros(1, 2, model.cfg.d_model, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match="give attention_mask"):
        mixed.blocks[0].attn(x, x, x, additive_attention_mask=torch.zeros(1, 1, 1, 2))
