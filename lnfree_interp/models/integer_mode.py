"""Computing a model in integers for the length of a `with`, as autocast computes it in bfloat16.

What is intercepted, of whatever runs inside, hooks included: `F.linear` and `torch.addmm`, which
are the linear layers of every model here, unembedding included; `F.embedding`, and rows taken from
the model's own W_E and W_pos; this package's norms and scalers. Attention's two products, its
softmax and rotation, activation functions, sums on the residual stream and the loss stay in
floating point. The model itself is not touched.

Source: arXiv 2209.09815.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformer_lens import HookedTransformer
from transformer_lens.components import LayerNorm, LayerNormPre, RMSNorm, RMSNormPre

from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.models.fixed_point import WIDTHS
from lnfree_interp.models.integer_layers import (
    Draws,
    integer_lookup,
    integer_norm,
    integer_product,
)
from lnfree_interp.models.norm_layer import norm_layer
from lnfree_interp.models.norms import describe
from lnfree_interp.models.running import require_hooked


class IntegerArithmetic(TorchFunctionMode):
    """While it is entered, this thread's linear layers, embeddings and norms are of integers.

    Attributes:
        bits: Their width.
        draws: Numbers the layers, for what the backward pass draws.
        counts: How often a forward pass did what, by the names of `models.integer_operations`.
    """

    def __init__(self, model: HookedTransformer, bits: int, key: str = "0"):
        """An arithmetic for a model.

        Args:
            model: The model.
            bits: The width of the integers, sign included.
            key: What is drawn depends on.

        Raises:
            DataError: if there is no such width.
            UnsupportedModelError: if a layer of the model would not be of integers.
        """
        super().__init__()
        if bits not in WIDTHS:
            raise DataError(f"integers of {bits} bits: give {WIDTHS[0]} to {WIDTHS[-1]}")
        _require_integer_layers(model)
        self.model, self.bits = model, bits
        self.draws, self.counts = Draws(key), Counter[str]()
        self._instead: dict[Callable[..., Any], Callable[..., Any]] = {
            F.linear: self._linear,
            torch.addmm: self._addmm,
            F.embedding: self._embedding,
            Tensor.__getitem__: self._rows,
            norm_layer: self._norm,
            F.softmax: self._softmax,
            F.scaled_dot_product_attention: self._attention,
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The function, or what takes its place."""
        instead = self._instead.get(func)
        if instead is None:
            return func(*args, **(kwargs or {}))
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedModelError(
                "torch.func (gradients of single sequences, as fisher_information takes them) has "
                "no integer arithmetic: call it outside"
            )
        return instead(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        _require_eager(self.model)
        return super().__enter__()

    def _linear(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return self._product(x, W.T, b)

    def _addmm(self, b: Tensor, x: Tensor, W: Tensor, **factors: Any) -> Tensor:
        if factors:
            raise UnsupportedModelError(
                f"addmm with {', '.join(factors)} is not computed in integers: multiply afterwards"
            )
        return self._product(x, W, b)

    def _product(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        self.counts["products, linear layers"] += x.numel() * W.shape[1]
        self.counts["roundings, activations"] += x.numel()
        return integer_product(x, W, b, self.bits, self.draws.next())

    def _embedding(
        self,
        rows: Tensor,
        W: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        given = padding_idx is not None or max_norm is not None
        if given or scale_grad_by_freq or sparse:
            raise UnsupportedModelError(
                "an embedding with a padding index, a largest norm, scaled or sparse gradients is "
                "not computed in integers"
            )
        self.counts["rows, embeddings"] += rows.numel()
        return integer_lookup(W, rows, self.bits, self.draws.next())

    def _rows(self, x: Tensor, index: Any) -> Tensor:
        """Rows of an embedding that are taken by an index; all else as it is."""
        row, *rest = index if isinstance(index, tuple) else (index,)
        of_rows = isinstance(row, slice) or (isinstance(row, Tensor) and row.dtype == torch.int64)
        if not (self._embeds(x) and of_rows and all(one == slice(None) for one in rest)):
            return x[index]
        return self._embedding(torch.arange(len(x), device=x.device)[row], x)

    def _embeds(self, x: Tensor) -> bool:
        """Whether it is one of the model's own embeddings."""
        places = (self.model.embed, getattr(self.model, "pos_embed", None))
        return any(
            x is getattr(place, name, None)
            for place, name in zip(places, ("W_E", "W_pos"), strict=True)
        )

    def _norm(self, norm: nn.Module, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        told = describe(norm)
        vectors = x.numel() // x.shape[-1]
        self.counts["products, norms and scalers"] += x.numel()
        self.counts["roundings, activations"] += x.numel()
        if told.statistic is not None:
            self.counts["square roots, norms"] += vectors
            self.counts["divisions, norms"] += vectors
        if told.pointwise:
            self.counts["curves, norms"] += x.numel()
        return integer_norm(norm, x, gain, bias, self.bits, self.draws.next())

    def _softmax(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        self.counts["in floating point: exponentials, softmax"] += x.numel()
        return F.softmax(x, *rest, **more)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        scores = q.numel() // q.shape[-1] * k.shape[-2]
        self.counts["in floating point: exponentials, softmax"] += scores
        return F.scaled_dot_product_attention(q, k, v, *rest, **more)


def _require_integer_layers(model: HookedTransformer) -> None:
    """Refuse what would not be of integers, or not what it is taken for."""
    require_hooked(model)
    cfg = model.cfg
    for flag in ("use_split_qkv_input", "use_attn_in", "use_attn_result"):
        if getattr(cfg, flag):
            raise UnsupportedModelError(
                f"cfg.{flag} computes attention head by head, and not by linear layers: integer "
                f"arithmetic needs it off, model.set_{flag}(False)"
            )
    for name, module in model.named_modules():
        if isinstance(module, LayerNorm | LayerNormPre | RMSNorm | RMSNormPre):
            raise UnsupportedModelError(
                f"{name} is a norm of TransformerLens, which is not computed in integers: call "
                "lf.with_norm_sites(model) first, on a model as lf.load gives it"
            )
    if any(isinstance(W, DTensor) for W in model.parameters()):
        raise UnsupportedModelError(
            "FSDP has spread the weights, whose integers share one exponent: use integer "
            "arithmetic without FSDP"
        )


def _require_eager(model: HookedTransformer) -> None:
    """Refuse a compiled model, inside which nothing is intercepted."""
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or type(module).__name__ == "OptimizedModule":
            raise UnsupportedModelError(
                f"{name or 'the model'} is compiled, and nothing in it can be computed in "
                "integers: take it as it was before torch.compile"
            )


def integer_arithmetic(model: HookedTransformer, bits: int, *, seed: int = 0) -> IntegerArithmetic:
    """Compute a model's linear layers, embeddings and norms in integers, inside a `with`.

    As under autocast, it holds for whatever this thread runs inside, and a backward pass may come
    afterwards. Weights, activations and gradients become dynamic fixed point: integers with one
    power of two for each tensor. Integers of 8 bits use torch's integer kernel; others are
    simulated exactly, and slow. Attention's two products and its softmax stay in floating point.

    Args:
        model: A `HookedTransformer` that is folded, in the frozen form or with norm sites.
        bits: The width of the integers, sign included, 2 to 16.
        seed: Of the stochastic rounding of gradients.

    Returns:
        A context for a `with`.

    Raises:
        DataError: if there is no such width.
        UnsupportedModelError: for a stock model with live norms, which `with_norm_sites` prepares;
            for one that is compiled, spread by FSDP, or computes attention head by head.

    Source:
        arXiv 2209.09815.

    Examples:
        >>> loss = lf.evaluate_loss(free, tokens)
        >>> with lf.integer_arithmetic(free, 16):
        ...     in_integers = lf.evaluate_loss(free, tokens)
        >>> abs(in_integers.mean - loss.mean) < 0.01
        True
    """
    return IntegerArithmetic(model, bits, str(seed))
