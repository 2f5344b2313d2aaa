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
