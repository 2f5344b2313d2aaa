"""Which arithmetic the hardware runs fast."""

import torch


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 natively; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False


def products_dtype(precision: str, weights: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix products in training.

    Args:
        precision: As a recipe names it. Where products are of integers, this is what they are
            rounded to.
        weights: The dtype of the weights.
        device: Where products are computed.
    """
    auto = precision == "auto" and weights == torch.float32 and bf16_is_fast(device)
    return torch.bfloat16 if auto or precision == "bfloat16" else weights


def integer_bits(precision: str) -> int | None:
    """The width of the integers that a recipe's precision names, such as 8 for `"int8"`; None for
    one of floating point."""
    return int(precision.removeprefix("int")) if precision.startswith("int") else None
