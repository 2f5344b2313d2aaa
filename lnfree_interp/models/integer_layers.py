"""Layers whose products, forward and backward, are of integers.

Forward, both operands are rounded to the nearest integers. Backward, the gradient of the output is
rounded stochastically, once, and multiplied with the integers of the forward pass:

    y = Q(x) Q(W) + b        dx = S(dy) Q(W)^T        dW = Q(x)^T S(dy)        db = sum of S(dy)

An embedding reads rows of Q(W), and adds up rows of S(dy). A norm computes with Q(x) and Q(gain),
and its derivative there is multiplied by S(dy). Rounding itself passes gradients on.

Source: arXiv 2209.09815.
"""

import random
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lnfree_interp.models.fixed_point import FixedPoint, fixed_point


class Draws:
    """Numbers a pass's draws, so that each is the same whenever it is made again.

    A layer takes its number in the forward pass: what is drawn for it does not depend on the order
    of the backward pass.
    """

    def __init__(self, key: str = "0"):
        self.begin(key)

    def begin(self, key: str) -> None:
        """Start counting again, under another key."""
        self._key, self._count = key, 0

    def next(self) -> int:
        """A seed for the next layer."""
        self._count += 1
        return random.Random(f"{self._key}, {self._count}").getrandbits(63)


def rounded_gradient(dy: Float[Tensor, "*shape"], bits: int, seed: int) -> FixedPoint:
    """A gradient, rounded stochastically."""
    return fixed_point(dy, bits, torch.Generator(dy.device).manual_seed(seed))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, bits: int, seed: int) -> Tensor:
        q, p = fixed_point(x, bits), fixed_point(W, bits)
        ctx.save_for_backward(q.integers, p.integers)
        ctx.about = q.exponent, p.exponent, x.dtype, W.dtype, bits, seed
        y = (q @ p).to(x.dtype)
        return y if b is None else y.add_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = dW = db = None
        e, f, x_dtype, W_dtype, bits, seed = ctx.about
        x, W = ctx.saved_tensors
        dy = rounded_gradient(grad_outputs[0], bits, seed)
        if ctx.needs_input_grad[0]:
            dx = (dy @ FixedPoint(W, f, bits, W_dtype).T).to(x_dtype)
        if ctx.needs_input_grad[1]:
            dW = (FixedPoint(x, e, bits, x_dtype).T @ dy).to(W_dtype)
        if ctx.needs_input_grad[2]:
            db = dy.sum(0)
        return dx, dW, db, None, None


def integer_product(
    x: Float[Tensor, "*batch d_in"],
    W: Float[Tensor, "d_in d_out"],
    b: Float[Tensor, " d_out"] | None,
    bits: int,
    seed: int,
) -> Float[Tensor, "*batch d_out"]:
    """x W + b: the product is of integers, forward and backward; the bias is added to it."""
    y: Any = _Product.apply(x.reshape(-1, x.shape[-1]), W, b, bits, seed)
    return y.view(*x.shape[:-1], W.shape[1])


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, rows: Tensor, bits: int, seed: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.about = len(W), bits, seed
        return fixed_point(W, bits)[rows].value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, bits, seed = ctx.about
        (rows,) = ctx.saved_tensors
        dy = rounded_gradient(grad_outputs[0].flatten(0, -2), bits, seed)
        return dy.rows_added(rows.flatten(), n), None, None, None


def integer_lookup(
    W: Float[Tensor, "n d"], rows: Int[Tensor, "*batch"], bits: int, seed: int
) -> Float[Tensor, "*batch d"]:
    """Rows of an embedding, of whose entries the largest sets the exponent."""
    found: Any = _Lookup.apply(W, rows, bits, seed)
    return found


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        return fixed_point(x, bits).value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None


class _RoundedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bits: int, seed: int) -> Tensor:
        ctx.about = bits, seed
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return rounded_gradient(grad_outputs[0], *ctx.about).value, None, None


def integer_norm(
    norm: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, bits: int, seed: int
) -> Tensor:
    """A norm of integers: input and gain are rounded, and the gradient of what comes out."""
    rounded: Any = _Rounded.apply(x, bits)
    multiplier: Any = None if gain is None else _Rounded.apply(gain, bits)
    y: Any = _RoundedBackward.apply(norm.compute(rounded, multiplier, bias), bits, seed)
    return y
