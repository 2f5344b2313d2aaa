"""Sublayers: their weights; and as they are in one forward pass, patterns and gates given."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.stream import Read, Stream


@dataclass(frozen=True, eq=False)
class Attention:
    """The weights of one attention sublayer, with grouped keys and values repeated per head."""

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"]  # noqa: N815
    b_K: Float[Tensor, "head d_head"]  # noqa: N815
    b_V: Float[Tensor, "head d_head"]  # noqa: N815
    b_O: Float[Tensor, " d_model"]  # noqa: N815
    scale: float
    """What scores are divided by."""
    cap: float
    """What scores are capped at; 0 for none."""

    NAMES: ClassVar = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")

    @classmethod
    def of(cls, module: Any, scale: float, cap: float) -> "Attention":
        """The weights of a module that has TransformerLens' names and shapes."""
        weights = {name: getattr(module, name).detach() for name in cls.NAMES}
        return cls(**weights, scale=scale, cap=cap)

    def onto_z(self, u: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch head d_head"]:
        """A direction of the stream, as a direction of each head's output z."""
        return (u @ self.W_O.flatten(0, 1).T).unflatten(-1, self.W_O.shape[:2])

    def onto_matrix(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "head d_head m"]:
        """A matrix that reads the stream, as a matrix that reads each head's output z."""
        return self.W_O @ W

    def double(self) -> "Attention":
        """The same weights in float64."""
        return replace(self, **{name: getattr(self, name).double() for name in self.NAMES})

    def write(
        self, z: Float[Tensor, "*batch some d_head"], heads: list[int]
    ) -> Float[Tensor, "*batch some d_model"]:
        """What some heads write to the stream."""
        return einsum(z, self.W_O[heads], "... head k, head k d -> ... head d")


@dataclass(frozen=True, eq=False)
class MLP:
    """The weights of one MLP."""

    W_in: Float[Tensor, "d_model neuron"]
    W_gate: Float[Tensor, "d_model neuron"] | None
    W_out: Float[Tensor, "neuron d_model"]
    b_in: Float[Tensor, " neuron"]
    b_out: Float[Tensor, " d_model"]
    activation: Any
    """The activation function; in a gated MLP, that of the gate."""

    @property
    def before_activation(self) -> tuple[Float[Tensor, "d_model neuron"], Tensor]:
        """The weights and bias of the activation function's input."""
        if self.W_gate is None:
            return self.W_in, self.b_in
        return self.W_gate, torch.zeros_like(self.b_in)


@dataclass(frozen=True, eq=False)
class GivenMLP:
    """An MLP with its gates given."""

    weights: MLP
    post: Float[Tensor, "batch pos neuron"]
    gate: Float[Tensor, "batch pos neuron"]
    """What a neuron's linear input is multiplied by."""
    linear: str
    """The hook name of that input."""
    b_in: Float[Tensor, "*batch neuron"]
    """What biases add to a neuron's activation; for biases before the gate, times the gate."""
    b_post: Float[Tensor, " neuron"]
    """The share of it that comes from a bias behind the gate."""
    before: Read

    def onto_post(self, u: Stream) -> Float[Tensor, "batch pos neuron"]:
        """A direction of the stream, as a direction of the neurons' activations."""
        return u @ self.weights.W_out.T

    def back(self, u: Stream) -> Stream:
        """A direction of the stream behind the MLP, carried back to the stream before it."""
        return self.before.back((self.onto_post(u) * self.gate) @ self.weights.W_in.T)


@dataclass(frozen=True, eq=False)
class GivenBlock:
    """A block with its attention patterns and gates given."""

    layer: int
    attention: Attention
    pattern: Float[Tensor, "batch head query key"]
    z: Float[Tensor, "batch pos head d_head"]
    b_V: Float[Tensor, "*batch_pos head d_head"]  # noqa: N815
    """What value biases add to z, including what the norm's bias adds; one for all tokens where
    attention weights add up to one."""
    before: Read
    mlp: GivenMLP | None

    def back(self, u: Stream) -> Stream:
        """A direction of the stream behind the attention, carried back to the stream before it."""
        ahead = self.attention.onto_z(u)
        moved = einsum(self.pattern, ahead, "b head query key, b query head k -> b key head k")
        return self.before.back(einsum(moved, self.attention.W_V, "b s head k, head d k -> b s d"))
