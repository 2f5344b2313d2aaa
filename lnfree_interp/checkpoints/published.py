"""The published LN-free GPT-2 formats, each rewritten as the one that transformers can run.

**Constant epsilon** (`schaeff/gpt2-*_LNFree*`, `apollo-research/gpt2_noLN`): a `GPT2LMHeadModel`
whose LayerNorms have epsilon 1e12 and gains multiplied by 1e6. It still subtracts the mean; the
first keeps gamma / sigma in the gains and the biases live, the second has folded them in all but
`ln_f`. `constant_epsilon_norms` reads both.

**FakeLayerNorm** (`pytorch_model.bin`, submarat/removing-layer-norm): GPT-2's keys, and buffers
that say which norms are removed and by which constant. **LoRA** adapters may lie over it.

**nanoGPT** (`ckpt.pt`, ApolloResearch/gpt2_noLN): the layout of `nn.Linear`, exact GELU, and
neither constants nor flags: the user supplies sigma.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

from lnfree_interp.errors import CheckpointError, NormSiteError, UnsupportedModelError
from lnfree_interp.models.norm_map import NormMap
from lnfree_interp.models.site_names import sites_in
from lnfree_interp.numerics import LNFREE_EPSILON

_LIVE_BELOW = 1.0
"""Below this epsilon a norm is live. Between the two it is neither live nor constant."""

CONSTANT_EPSILON = 1e12
CONSTANT_GAIN = 1e6

_ORDINARY_GAIN = 50.0
"""No pretrained norm has a median gain above this; no gain over sigma times 1e6 is below it."""

_BUFFERS = (
    "is_fake",
    "attn_v_is_fake",
    "bos_special_treatment",
    "real_average_std",
    "real_bos_std",
    "grad_acc_steps",
    "global_step",
    "momentum",
    "average_std_buffer",
    "bos_std_buffer",
)

State = dict[str, Tensor]


def constant_epsilon_norms(
    weights: State,
    eps: float,
    centred: bool,
    source: str,
    sigma: Mapping[str, float] | None = None,
) -> dict[str, NormMap] | None:
    """The affine norms of a checkpoint with a huge epsilon, by site; None if its norms are live.

    Args:
        weights: By TransformerLens' names; the norms' own weights are taken out if constant.
        eps: Epsilon of the config.
        centred: Whether the architecture's norms subtract the mean.
        source: For messages.
        sigma: The constants that the gains were divided by, by norm, if known: what the frozen
            form shows as `hook_scale`. Default: such that the gains behind it are 1 on average.

    Raises:
        CheckpointError: if epsilon and gains do not fit together, or only a part of the norms is
            removed.
    """
    gains = {name[:-2]: W for name, W in weights.items() if _is_gain(name)}
    typical = {name: W.float().abs().median().item() for name, W in gains.items()}
    if eps < _LIVE_BELOW:
        if huge := [name for name, gain in typical.items() if gain > 20 * _ORDINARY_GAIN]:
            raise CheckpointError(
                f"{source}: the gain of {huge[0]} is {typical[huge[0]]:.3g} at an epsilon of "
                f"{eps:g}: an LN-free export whose config.json has lost its epsilon of 1e12?"
            )
        return None
    if eps < LNFREE_EPSILON:
        raise CheckpointError(
            f"{source}: epsilon {eps:g} in config.json is neither small (a live norm) nor so large "
            f"that it drowns every variance (an LN-free export has 1e12)"
        )
    root = math.sqrt(eps)
    if live := [name for name, gain in typical.items() if gain < _ORDINARY_GAIN]:
        raise CheckpointError(
            f"{source}: {len(live)} of {len(gains)} norms are not removed, but have ordinary gains "
            f"under an epsilon of {eps:g}: {', '.join(live[:3])} ({typical[live[0]]:.3g})"
        )
    uniform = [name for name, W in gains.items() if (W[0] == W).all()]
    plain = not any(weights[f"{name}.b"].any() for name in uniform if f"{name}.b" in weights)
    folded = {gains[name][0].item() for name in uniform}
    # Norms that were folded away all have one gain and no bias, if nobody says otherwise.
    if (
        sigma is None
        and plain
        and len(folded) == 1
        and abs((gain := folded.pop()) / root - 1) > 0.1
    ):
        raise CheckpointError(
            f"{source}: epsilon {eps:g} in config.json does not fit: folded norms have gains of "
            f"its square root, {root:.4g}, and these have {gain:.4g}"
        )
    norms, known = {}, sigma or {}
    for name, W in gains.items():
        gain = W.double() / root
        shown = known.get(name) or known.get(sites_in(name)[-1]) or 1 / gain.abs().mean().item()
        weights.pop(f"{name}.w")
        bias = weights.pop(f"{name}.b", None)
        # A copy, which does not keep the whole file in memory.
        norm = NormMap(
            centred,
            statistic=None,
            scale=shown,
            factor=shown,
            gain=gain,
            bias=None if bias is None else bias.clone(),
        )
        norms |= dict.fromkeys(sites_in(name), norm)
    return norms


def _is_gain(name: str) -> bool:
    norm = name.removesuffix(".w").rpartition(".")[2]
    return name.endswith(".w") and (norm.startswith("ln") or norm.endswith("_norm"))


def merge_lora(state: State, source: str) -> bool:
    """Merge adapters in place, W = W_frozen + A B, and say whether there were any.

    Raises:
        CheckpointError: if an adapter lacks a part.
    """
    adapted = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    for name in adapted:
        try:
            parts = ("weight_frozen", "lora_A", "lora_B")
            W, A, B = (state.pop(f"{name}.{part}") for part in parts)
        except KeyError as error:
            raise CheckpointError(f"{source}: adapter {name} lacks {error}") from error
        shapes = [list(part.shape) for part in (W, A, B)]
        fits = A.ndim == B.ndim == 2 and W.shape == (A.shape[0], B.shape[1])
        if not (fits and A.shape[1] == B.shape[0] and _stored_in_full(W, A, B)):
            raise CheckpointError(
                f"{source}: adapter {name} does not fit: weight_frozen, lora_A and lora_B are "
                f"{', '.join(map(str, shapes))}"
            )
        if not all(part.is_floating_point() for part in (W, A, B)):
            raise CheckpointError(f"{source}: adapter {name} holds whole numbers")
        precise = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
        # In place where the dtype allows it: the tensor is ours alone, mapped or read.
        merged = W.to(precise).addmm_(A.to(precise), B.to(precise))
        state[f"{name}.weight"] = merged.to(W.dtype)
        if (b := state.pop(f"{name}.bias_frozen", None)) is not None:
            state[f"{name}.bias"] = b
    return bool(adapted)


def _stored_in_full(*tensors: Tensor) -> bool:
    """Whether every tensor stores all the numbers that it shows; an expanded one does not."""
    return all(W.numel() * W.element_size() <= W.untyped_storage().nbytes() for W in tensors)


def take_fake_layer_norms(state: State, source: str) -> dict[str, float] | None:
    """The constants of FakeLayerNorms by norm (`transformer.h.0.ln_1`), and their buffers removed.

    Returns:
        None if there is no FakeLayerNorm in the state.

    Raises:
        CheckpointError: if a norm is live, or treats a position or a token apart.
    """
    mark = ".average_std_buffer"
    norms = [name.removesuffix(mark) for name in state if name.endswith(mark)]
    if not norms:
        return None
    sigma: dict[str, float] = {}
    for norm in norms:
        buffers = {b: state.pop(f"{norm}.{b}") for b in _BUFFERS if f"{norm}.{b}" in state}
        # Values read ln_1 alone, so only there that flag means something.
        flags = ["is_fake"] + ["attn_v_is_fake"] * norm.endswith("ln_1")
        for flag in flags:
            if flag not in buffers:
                raise CheckpointError(
                    f"{source}: {norm} has no {flag}, so nothing says whether that norm is removed"
                )
            if buffers[flag].numel() != 1:
                raise CheckpointError(f"{source}: {norm}.{flag} must hold a single value")
            if not bool(buffers[flag]):
                raise CheckpointError(f"{source}: {norm}.{flag} is false: that norm is still live")
        if f"{norm}.weight" not in state:
            raise CheckpointError(f"{source}: {norm} has constants, but no weight")
        average = buffers["average_std_buffer"].double().flatten()
        if not len(average):
            raise CheckpointError(f"{source}: {norm}.average_std_buffer is empty")
        constant = average[min(1, len(average) - 1)].item()
        special = {"average_std_buffer": average}
        if norm.endswith("ln_1") and "bos_std_buffer" in buffers:
            special["bos_std_buffer"] = buffers["bos_std_buffer"].double().flatten()
        for name, values in special.items():
            if (other := values[values != constant]).numel():
                what = "end-of-text tokens" if name == "bos_std_buffer" else "index 0"
                raise CheckpointError(
                    f"{source}: {norm}.{name} holds {other[0].item():.4g} beside {constant:.4g}: "
                    f"{what} are divided by another constant, which cannot be folded"
                )
        if not 0 < constant < math.inf:
            raise CheckpointError(
                f"{source}: {norm} divides by {constant}; a constant must be positive and finite"
            )
        sigma[norm] = constant
    return sigma


def move_constants_into_gains(
    state: State, sigma: Mapping[str, Tensor | float], dtype: torch.dtype
) -> None:
    """Put gamma * 1e6 / sigma in the place of each gain, so that plain transformers can run it."""
    for norm, constant in sigma.items():
        weight = state[f"{norm}.weight"].double()
        constant = torch.as_tensor(constant, dtype=torch.float64, device=weight.device)
        state[f"{norm}.weight"] = (weight * (CONSTANT_GAIN / constant)).to(dtype)


def read_nanogpt(checkpoint: Mapping[str, Any], source: str) -> tuple[GPT2Config, State]:
    """Config and state dict of a nanoGPT checkpoint, in Hugging Face's names and layout.

    Raises:
        CheckpointError: if it is not a nanoGPT checkpoint.
    """
    arguments, state = checkpoint.get("model_args"), checkpoint.get("model")
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{source}: not a nanoGPT checkpoint (no model and model_args)")
    if missing := [name for name in sizes if type(arguments.get(name)) is not int]:
        raise CheckpointError(f"{source}: model_args lacks {', '.join(missing)}")
    if not all(isinstance(n, str) and isinstance(W, Tensor) and W.ndim for n, W in state.items()):
        raise CheckpointError(f"{source}: its model is not a state dict of tensors")
    if not any(name.endswith("transformer.wte.weight") for name in state):
        raise CheckpointError(f"{source}: its model lacks transformer.wte.weight")
    config = GPT2Config(
        architectures=["GPT2LMHeadModel"],
        n_layer=arguments["n_layer"],
        n_head=arguments["n_head"],
        n_embd=arguments["n_embd"],
        n_positions=arguments["block_size"],
        vocab_size=arguments["vocab_size"],
        activation_function="gelu",  # nanoGPT's nn.GELU() is the exact one
        bos_token_id=None,
        eos_token_id=None,
    )
    renamed: State = {}
    for name, W in state.items():
        name = name.removeprefix("_orig_mod.")
        if name.endswith(".attn.bias"):  # the causal mask
            continue
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        renamed[name] = W.T if linear else W
    biased = ("ln_1", "ln_2", "ln_f", "c_attn", "c_proj", "c_fc")
    for name in [name for name in renamed if name.removesuffix(".weight").endswith(biased)]:
        bias = f"{name.removesuffix('.weight')}.bias"
        renamed.setdefault(bias, renamed[name].new_zeros(renamed[name].shape[-1]))
    renamed.setdefault("lm_head.weight", renamed["transformer.wte.weight"])
    return config, renamed


def nanogpt_sigma(
    std: Mapping[str, float], std_bos: Mapping[str, float], d_model: int
) -> dict[str, float | Tensor]:
    """The constants of a finished ApolloResearch/gpt2_noLN run, from its two tables.

    Its `std` "vector" for positions has length d_model and broadcasts over channels, so that its
    entry for position 0 divides channel 0. The last events of the run put that right in ln_1 only:
    ln_2 and ln_f divide channel 0 by the constant of position 0 for ever.

    Args:
        std: By hook name (`blocks.0.hook_resid_pre`, `...resid_mid`, `...resid_post`): the standard
            deviation at all positions but the first. The run's `std_dict`.
        std_bos: The same at the first position. The run's `std_bos_dict`.
        d_model: Width of the residual stream.

    Returns:
        What `load(..., sigma=...)` takes: a number for ln1, [d_model] for ln2 and ln_final.

    Raises:
        NormSiteError: if the tables do not fit together.

    Source:
        ApolloResearch/gpt2_noLN, the code of arXiv 2409.13710.

    Examples:
        >>> std = {f"blocks.0.hook_resid_{at}": 1.0 for at in ("pre", "mid", "post")}
        >>> std_bos = {hook: 9.0 for hook in std}
        >>> lf.formats.nanogpt_sigma(std, std_bos, d_model=3)["ln_final"]
        tensor([9., 1., 1.], dtype=torch.float64)
    """
    n_layers = sum(name.endswith(".hook_resid_pre") for name in std)
    sigma: dict[str, float | Tensor] = {}

    def by_channel(hook: str) -> Tensor:
        channels = torch.full((d_model,), float(std[hook]), dtype=torch.float64)
        channels[0] = float(std_bos[hook])
        return channels

    try:
        for layer in range(n_layers):
            sigma[f"blocks.{layer}.ln1"] = float(std[f"blocks.{layer}.hook_resid_pre"])
            sigma[f"blocks.{layer}.ln2"] = by_channel(f"blocks.{layer}.hook_resid_mid")
        sigma["ln_final"] = by_channel(f"blocks.{n_layers - 1}.hook_resid_post")
    except KeyError as error:
        raise NormSiteError(f"the tables of standard deviations lack {error}") from error
    return sigma


def hf_norms(config: GPT2Config) -> dict[str, str]:
    """TransformerLens' name of each norm -> Hugging Face's."""
    names = {"ln_final": "transformer.ln_f"}
    for layer in range(config.n_layer):
        names[f"blocks.{layer}.ln1"] = f"transformer.h.{layer}.ln_1"
        names[f"blocks.{layer}.ln2"] = f"transformer.h.{layer}.ln_2"
    return names


def sigma_by_hf_norm(
    sigma: Mapping[str, float | Tensor], config: GPT2Config, source: str
) -> dict[str, Tensor]:
    """The user's constants by Hugging Face's names of the norms, checked.

    Raises:
        NormSiteError: for a norm that is missing or unknown, or a constant that cannot be one.
    """
    if not isinstance(sigma, Mapping):
        raise NormSiteError(
            f"{source}: sigma is a {type(sigma).__name__}; pass a dictionary from names of norms "
            "to numbers"
        )
    names = hf_norms(config)
    if unknown := sorted(set(sigma) - set(names)):
        raise NormSiteError(f"{source}: sigma names {unknown[0]}, which the model does not have")
    if missing := [name for name in names if name not in sigma]:
        raise NormSiteError(
            f"{source}: no sigma for {', '.join(missing[:3])}: the file does not say which norms "
            "are removed, so every one needs a constant"
        )
    constants = {}
    for ours, theirs in names.items():
        try:
            value = torch.as_tensor(sigma[ours], dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise NormSiteError(f"{source}: sigma of {ours} is not a number: {error}") from error
        if value.shape not in ((), (config.n_embd,)):
            raise NormSiteError(
                f"{source}: sigma of {ours} has shape {list(value.shape)}, not [] or "
                f"[{config.n_embd}]"
            )
        if not (value.isfinite() & (value > 0)).all():
            raise NormSiteError(f"{source}: sigma of {ours} must be positive and finite")
        constants[theirs] = value
    return constants


def typical_sigma(value: Tensor | float) -> float:
    """One number for a constant that differs by channel: that of all channels but the first."""
    value = torch.as_tensor(value).flatten()
    return value[min(1, len(value) - 1)].item()


def refuse_float16(dtype: torch.dtype, source: str) -> None:
    """Refuse float16, which gains of 1e6 overflow.

    Raises:
        UnsupportedModelError: for float16.
    """
    if dtype == torch.float16:
        raise UnsupportedModelError(f"{source}: its gains of 1e6 overflow float16: load in float32")
