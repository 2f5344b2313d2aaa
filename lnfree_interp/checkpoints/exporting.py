"""`HookedTransformer` -> a Hugging Face folder that plain `transformers` loads.

`GPT2LMHeadModel` has no LN-free form, so an LN-free model wears the published disguise: epsilon
1e12 and gains of 1e6 make every LayerNorm subtract the mean and multiply by one
(ApolloResearch/gpt2_noLN). Folded readers ignore the mean, so nothing changes. The unembedding
bias has no slot in `GPT2LMHeadModel`; it rides on the direction that centring has emptied: with
ln_f's bias at 1 and b_U / d_model added to every row of W_U, ln_f's output x + 1 reads

    (x + 1) (W_U + 1 b_U / d)  =  x W_U + b_U          since  x 1 = 0  and  1 W_U = 0
"""

import os
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import GPT2Config, GPT2LMHeadModel

from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.files import new_folder
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.sites import has_norm_sites

CONSTANT_NORM_EPSILON = 1e12
CONSTANT_NORM_GAIN = 1e6

DISGUISE_ERROR = 1e-7
"""Relative error that the disguise itself may cause: variance / (2 * epsilon), below 1e-8 at the
largest residual norms of GPT-2. Only float64 can see it."""

# A reader counts as centred when its column means are below this share of its largest weight.
_CENTRED = {torch.float64: 1e-12, torch.float32: 1e-6}


def to_transformers(model: HookedTransformer) -> GPT2LMHeadModel:
    """The same logits as a `GPT2LMHeadModel`.

    Args:
        model: GPT-2-like, either LN-free (`normalization_type=None`, folded from LayerNorm) or with
            live LayerNorms and no unembedding bias.

    Raises:
        UnsupportedModelError: for a model that `GPT2LMHeadModel` cannot represent.
        InexactError: if the logits differ by more than rounding explains.
    """
    cfg = model.cfg
    if has_norm_sites(model):
        raise UnsupportedModelError("norm sites cannot be exported: fold(model) first")
    if cfg.original_architecture != "GPT2LMHeadModel" or cfg.normalization_type not in ("LN", None):
        raise UnsupportedModelError(
            f"only GPT-2 with LayerNorm or without norms is exported, not "
            f"{cfg.original_architecture} with normalization_type={cfg.normalization_type!r}"
        )
    lnfree = cfg.normalization_type is None
    if lnfree and cfg.dtype == torch.float16:
        raise UnsupportedModelError(
            "float16 ends at 65504, the exported gains are 1e6: use float32"
        )
    state = _shared_weights(model)
    if lnfree:
        _require_centred_readers(model)
        state |= _constant_norms(model)
        W_U = model.W_U + model.b_U / cfg.d_model
    else:
        if model.b_U.any():
            raise UnsupportedModelError("GPT2LMHeadModel has no unembedding bias; this model has")
        state |= _live_norms(model)
        W_U = model.W_U
    tied = torch.equal(W_U.T, model.W_E)
    state["lm_head.weight"] = W_U.T
    config = GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=cfg.d_vocab,
        n_positions=cfg.n_ctx,
        n_embd=cfg.d_model,
        n_layer=cfg.n_layers,
        n_head=cfg.n_heads,
        n_inner=cfg.d_mlp,
        activation_function=cfg.act_fn,
        layer_norm_epsilon=CONSTANT_NORM_EPSILON if lnfree else cfg.eps,
        scale_attn_weights=cfg.use_attn_scale,
        scale_attn_by_inverse_layer_idx=cfg.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=tied,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=getattr(model.tokenizer, "bos_token_id", None),
        eos_token_id=getattr(model.tokenizer, "eos_token_id", None),
        dtype=cfg.dtype,
    )
    exported = GPT2LMHeadModel(config).to(cfg.dtype)
    exported.load_state_dict({name: W.detach() for name, W in state.items()})
    exported.to(model.W_E.device).eval()
    error = compare_logits(exported, model)
    error.require(
        "exported against HookedTransformer logits",
        max(error.tolerance, DISGUISE_ERROR) if lnfree else None,
    )
    return exported


def export(model: HookedTransformer, out: str | os.PathLike[str]) -> Path:
    """Write a Hugging Face folder: config.json, model.safetensors and the tokenizer.

    Args:
        model: As for `to_transformers`.
        out: A folder that does not exist yet or is empty. It appears when it is complete.

    Returns:
        The folder.

    Raises:
        OutputError: if the folder holds something.
        UnsupportedModelError, InexactError: as `to_transformers`.
    """
    exported = to_transformers(model)
    with new_folder(out) as folder:
        exported.save_pretrained(folder)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    return Path(out)


def _shared_weights(model: HookedTransformer) -> dict[str, Tensor]:
    """Everything but norms and unembedding, in the layout of `GPT2LMHeadModel`."""
    state = {
        "transformer.wte.weight": model.W_E,
        "transformer.wpe.weight": model.W_pos,
    }
    for layer, block in enumerate(model.blocks):
        attn, mlp, prefix = block.attn, block.mlp, f"transformer.h.{layer}"
        qkv = torch.stack([attn.W_Q, attn.W_K, attn.W_V])
        state[f"{prefix}.attn.c_attn.weight"] = rearrange(
            qkv, "path head d_model d_head -> d_model (path head d_head)"
        )
        state[f"{prefix}.attn.c_attn.bias"] = torch.stack([attn.b_Q, attn.b_K, attn.b_V]).flatten()
        state[f"{prefix}.attn.c_proj.weight"] = attn.W_O.flatten(0, 1)
        state[f"{prefix}.attn.c_proj.bias"] = attn.b_O
        state[f"{prefix}.mlp.c_fc.weight"] = mlp.W_in
        state[f"{prefix}.mlp.c_fc.bias"] = mlp.b_in
        state[f"{prefix}.mlp.c_proj.weight"] = mlp.W_out
        state[f"{prefix}.mlp.c_proj.bias"] = mlp.b_out
    return state


def _live_norms(model: HookedTransformer) -> dict[str, Tensor]:
    state = {"transformer.ln_f.weight": model.ln_final.w, "transformer.ln_f.bias": model.ln_final.b}
    for layer, block in enumerate(model.blocks):
        for theirs, norm in (("ln_1", block.ln1), ("ln_2", block.ln2)):
            state[f"transformer.h.{layer}.{theirs}.weight"] = norm.w
            state[f"transformer.h.{layer}.{theirs}.bias"] = norm.b
    return state


def _constant_norms(model: HookedTransformer) -> dict[str, Tensor]:
    gain = torch.full_like(model.W_pos[0], CONSTANT_NORM_GAIN)
    state = {"transformer.ln_f.weight": gain, "transformer.ln_f.bias": torch.ones_like(gain)}
    for layer in range(model.cfg.n_layers):
        for theirs in ("ln_1", "ln_2"):
            state[f"transformer.h.{layer}.{theirs}.weight"] = gain
            state[f"transformer.h.{layer}.{theirs}.bias"] = torch.zeros_like(gain)
    return state


def _require_centred_readers(model: HookedTransformer) -> None:
    """The disguise subtracts the mean of the stream: only harmless where no reader sees it."""
    tolerance = _CENTRED.get(model.cfg.dtype, 1e-2)
    readers = {"W_Q": model.W_Q, "W_K": model.W_K, "W_V": model.W_V, "W_in": model.W_in}
    for name, W in (readers | {"W_U": model.W_U}).items():
        if W.mean(-2).abs().max() > tolerance * W.abs().max():
            raise UnsupportedModelError(
                f"{name} reads the mean of the residual stream, which GPT2LMHeadModel's LayerNorm "
                "subtracts: only models folded from LayerNorm can be exported"
            )
