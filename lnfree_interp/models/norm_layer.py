"""Where a norm can be computed in another arithmetic: `models.integer_mode`.

A norm hands itself, its input, its gain and its bias to `norm_layer`, which calls its `compute`. A
`TorchFunctionMode` sees the call like one of torch's own functions.
"""

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def norm_layer(norm: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a norm makes of its input.

    Args:
        norm: A module with a method `compute(x, gain, bias)`.
        x: Its input, [..., d].
        gain: What it multiplies by at the end, [d]; None for ones.
        bias: What it adds then, [d]; None for zeros.
    """
    if has_torch_function((x,)):
        return handle_torch_function(norm_layer, (x,), norm, x, gain, bias)
    return norm.compute(x, gain, bias)
