"""The modules that can stand at a norm site.

Live, a norm divides by each token's own standard deviation (RMSNorm: root mean square). Frozen, it
divides by one constant:

    x -> ((x - mean(x)) / sigma) * w + b        (RMSNorm: x -> (x / sigma) * w)

which is affine in x, and so folds into the weights that read it (`models.folding`). The first token
of a prompt may have a constant of its own: the map is affine at every position, but does not fold.
With a gate g between, it multiplies by  g / own(x) + (1 - g) / sigma.  The hook names are
TransformerLens': `hook_scale` [batch, pos, 1] is what is divided by, `hook_normalized`
[batch, pos, d_model] the quotient before gain and bias. A frozen norm fires both, with the constant
at full shape. Two more are ours: `hook_in`, the norm's input, and `hook_sigma`, the constant before
the gate.

Sources: frozen, "You can remove GPT2's LayerNorm by fine-tuning", arXiv 2409.13710; the gate,
TaperNorm, arXiv 2602.10408; CRMSNorm, arXiv 2305.14858.
"""

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformer_lens.components import LayerNorm, LayerNormPre, RMSNorm, RMSNormPre
from transformer_lens.hook_points import HookPoint

from lnfree_interp.errors import NormSiteError, UnsupportedModelError
from lnfree_interp.models.first_token import first_tokens
from lnfree_interp.models.maps import LiveMap, centre, make_map
from lnfree_interp.models.norm_layer import norm_layer
from lnfree_interp.models.norm_map import NormMap, require_positive
from lnfree_interp.models.running import is_watched
from lnfree_interp.numerics import wide


def describe(norm: nn.Module) -> NormMap:
    """What a norm module does.

    Args:
        norm: The module at a norm site: this package's, or a norm of TransformerLens.

    Raises:
        UnsupportedModelError: for a module of any other class.
    """
    if isinstance(norm, FrozenNorm):
        return NormMap(norm.centred, None, norm.constant, norm.first)
    if isinstance(norm, Norm):
        return NormMap(
            norm.centred,
            statistic=None if norm.frozen else norm.map.statistic,
            scale=None if norm.live else norm.constant,
            first=None if norm.live else norm.first,
            factor=norm.factor,
            pointwise=norm.map.pointwise and not norm.frozen,
            gain=norm.w,
            bias=norm.bias,
        )
    if isinstance(norm, Scaler):
        return NormMap(centred=False, statistic=None, scale=1.0, gain=norm.gain)
    if isinstance(norm, nn.Identity):
        return NormMap(centred=False, statistic=None, scale=1.0)
    if isinstance(norm, LayerNorm | LayerNormPre):
        gain, bias = getattr(norm, "w", None), getattr(norm, "b", None)
        return NormMap(True, "standard deviation", gain=gain, bias=bias)
    if isinstance(norm, RMSNorm | RMSNormPre | CRMSNormPre):
        return NormMap(False, "root mean square", gain=getattr(norm, "w", None))
    raise UnsupportedModelError(
        f"{type(norm).__name__} stands where a norm is expected, and what it computes is not known "
        "here. Known are LayerNorm and RMSNorm of TransformerLens, with or without gain, and the "
        "norms of lnfree_interp"
    )


class _Constants(nn.Module):
    """A norm's constants: buffers that stay in float64 when the model is cast to another dtype.

    Attributes:
        sigma: The constant that a frozen norm divides by, a scalar; NaN while there is none.
        sigma_first: The same for the first token of a prompt; NaN where it has sigma too.
        constant: sigma as a plain number.
        first: sigma_first as a plain number; None where the first token has sigma too.
    """

    sigma: Tensor
    sigma_first: Tensor

    def __init__(self, sigma: float, first: float | None):
        super().__init__()
        own = torch.nan if first is None else first
        self.register_buffer("sigma", torch.tensor(sigma, dtype=torch.float64))
        self.register_buffer("sigma_first", torch.tensor(own, dtype=torch.float64))

    def remember(self) -> None:
        """The buffers as plain numbers, which a forward pass reads without waiting for a GPU."""
        self.constant, first = self.sigma.item(), self.sigma_first.item()
        self.first = None if math.isnan(first) else first

    def _sigma(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """What a frozen norm divides each token by."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        sigma = torch.full((), self.constant, dtype=dtype, device=x.device)
        sigma = sigma.expand(*x.shape[:-1], 1)
        return sigma if self.first is None else torch.where(first_tokens(x), self.first, sigma)

    def _shown(self) -> str:
        shown = f"sigma={self.constant:.4g}"
        return shown if self.first is None else f"{shown}, {self.first:.4g} for the first token"

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.remember()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, constant in exact.items():
            setattr(self, name, constant.to(self.get_buffer(name).device))
        return self


class Norm(_Constants):
    """A norm that can be frozen.

    Attributes:
        map: What it is while live.
        w: Gain, [d].
        b: Bias, [d]; None for a norm without one.
        factor: A constant that multiplies the whole output, as in LayerNorm Scaling.
        gate: Share of the live norm, a scalar: 1 live, 0 frozen.
    """

    def __init__(self, live: LiveMap, w: nn.Parameter, b: nn.Parameter | None, factor: float = 1.0):
        super().__init__(torch.nan, None)
        require_positive(factor)
        self.map = live
        self.w = w
        self.b = b
        self.factor = factor
        self.register_buffer("gate", torch.ones((), dtype=torch.float64))
        self.remember()
        self.hook_in = HookPoint()
        self.hook_sigma = HookPoint()
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    @classmethod
    def from_stock(cls, norm: LayerNorm | RMSNorm) -> "Norm":
        """Take over gain, bias and epsilon of a norm of TransformerLens, without a copy."""
        given = describe(norm)
        name = "LayerNorm" if given.centred else "RMSNorm"
        return cls(make_map(name, float(norm.eps)), norm.w, cast(Any, given.bias))

    @property
    def centred(self) -> bool:
        """Whether the mean is subtracted: LayerNorm, not RMSNorm."""
        return self.map.centred

    @property
    def eps(self) -> float:
        """What is added under the root while live; NaN for a map that has no root."""
        return self.map.eps

    @property
    def bias(self) -> Float[Tensor, " d"] | None:
        """What is added at the end, [d]: the parameter b times the factor."""
        return self.b if self.b is None or self.factor == 1 else self.b * self.factor

    gate: Tensor

    @property
    def share_live(self) -> float:
        """The gate as a plain number."""
        return self._gate

    def remember(self) -> None:
        """As for every constant, the gate too."""
        super().remember()
        self._gate = self.gate.item()

    @property
    def live(self) -> bool:
        """Whether the norm divides by each token's own scale, and by nothing else."""
        return self._gate == 1

    @property
    def frozen(self) -> bool:
        """Whether the norm divides by a constant, and by nothing else."""
        return self._gate == 0

    def freeze(self, sigma: float, gate: float = 0.0, first: float | None = None) -> None:
        """Divide by `sigma` from now on, with a share `gate` of the live norm left.

        Args:
            sigma: The constant.
            gate: The share of the live norm, 0 to 1.
            first: The constant of the first token of each prompt. Default: `sigma`.

        Raises:
            NormSiteError: if a constant is not a positive finite number, or the gate not in 0..1.
        """
        require_positive(sigma)
        require_positive(sigma if first is None else first)
        if not 0 <= gate <= 1:
            raise NormSiteError(f"gate={gate} is not a share of the live norm: pass 0 to 1")
        self.sigma.fill_(sigma)
        self.sigma_first.fill_(torch.nan if first is None else first)
        self.gate.fill_(gate)
        self.remember()

    def thaw(self) -> None:
        """Divide by each token's own standard deviation again."""
        self.sigma.fill_(torch.nan)
        self.sigma_first.fill_(torch.nan)
        self.gate.fill_(1)
        self.remember()

    @property
    def hooked(self) -> bool:
        """Whether anybody reads or changes an activation between this norm's input and output."""
        hooks = (self.hook_sigma, self.hook_scale, self.hook_normalized)
        return any(map(is_watched, hooks))

    def token_sigma(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """Each token's own scale: what a live norm divides by, on average over entries where it
        bends them by a curve."""
        return self.map.token_scale(wide(x))

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise over the last dimension."""
        return self.normalise(self.hook_in(x))

    def normalise(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """From `hook_in` on."""
        gain, bias = self.w if self.factor == 1 else self.w * self.factor, self.bias
        return norm_layer(self, x, gain, bias)

    def compute(
        self,
        x: Float[Tensor, "*batch d"],
        gain: Float[Tensor, " d"],
        bias: Float[Tensor, " d"] | None,
    ) -> Float[Tensor, "*batch d"]:
        """The norm with this gain and bias; fused when nobody looks inside."""
        if not self.hooked:
            if self.live and (y := self.map.fused(x, gain, bias)) is not None:
                return y
            if self.frozen and self.first is None:
                gain = gain / self.constant
                if self.centred and bias is not None:
                    return _CentredAffine.apply(x, gain, bias)
                x = centre(x) if self.centred else x
                return x * gain if bias is None else torch.addcmul(bias, x, gain)
        sigma = None if self.live else self._sigma(x)
        dtype, x = x.dtype, wide(x)
        y = self._normalised(centre(x) if self.centred else x, sigma)
        y = self.hook_normalized(y).to(dtype) * gain
        return y if bias is None else y + bias

    def _normalised(
        self, centred: Float[Tensor, "*batch d"], sigma: Float[Tensor, "*batch 1"] | None
    ) -> Float[Tensor, "*batch d"]:
        """What gain and bias act on: of the live map, of the constant, or of both."""
        if sigma is None:
            if self.map.pointwise:
                return self.map(centred)
            return centred / self.hook_scale(self.map.scale(centred))
        constant = self.hook_sigma(sigma)
        if self.frozen:
            return centred / self.hook_scale(constant)
        if self.map.pointwise:
            through = centred / self.hook_scale(constant)
            return self._gate * self.map(centred) + (1 - self._gate) * through
        own = self.map.scale(centred)
        return centred / self.hook_scale(1 / (self._gate / own + (1 - self._gate) / constant))

    def extra_repr(self) -> str:
        """Live, or the constant, or both."""
        times = "" if self.factor == 1 else f", times {self.factor:.4g}"
        if self.live:
            return f"live{times}"
        constant = f"{self._shown()}{times}"
        return constant if self.frozen else f"{constant}, gate={self._gate:.3g}"


class _CentredAffine(torch.autograd.Function):
    """(x - mean(x)) * gain + bias, with half the passes over memory that autograd would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        ctx.save_for_backward(centred, gain)
        return torch.addcmul(bias, centred, gain)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (dy,) = grad_outputs
        centred, gain = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        d_gain = (rows * centred.flatten(0, -2)).sum(0)
        dx = dy * gain
        dx -= dx.mean(-1, keepdim=True)
        return dx, d_gain, rows.sum(0)


class SplitNorm(nn.Module):
    """A block's `ln1` as two sites, one read by queries and keys, one by values.

    Gain and bias are shared, as they are in the pretrained norm; what can differ is whether a site
    is frozen, and its sigma. The published order freezes `qk` in every layer before the first `v`.
    """

    def __init__(self, qk: Norm, v: Norm):
        super().__init__()
        self.qk = qk
        self.v = v

    @classmethod
    def from_stock(cls, norm: LayerNorm | RMSNorm) -> "SplitNorm":
        """Take over gain, bias and epsilon of a norm of TransformerLens, without a copy."""
        return cls.of(Norm.from_stock(norm))

    @classmethod
    def of(cls, norm: Norm) -> "SplitNorm":
        """Two sites of a live norm, which share all that it learns."""
        return cls(norm, Norm(norm.map, norm.w, norm.b, norm.factor))

    def forward(
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch d_model"]]:
        """The input of queries and keys, and that of values; one tensor while they are the same."""
        x_qk, x_v = self.qk.hook_in(x), self.v.hook_in(x)
        y_qk = self.qk.normalise(x_qk)
        same = x_qk is x_v and self._one_map
        return y_qk, y_qk if same else self.v.normalise(x_v)

    @property
    def _one_map(self) -> bool:
        """Whether both sites are the same map, and nobody looks inside either."""
        qk, v = self.qk, self.v
        if qk.hooked or v.hooked:
            return False
        same = (qk.constant, qk.first) == (v.constant, v.first)
        return (qk.live and v.live) or (qk.frozen and v.frozen and same)


class Scaler(nn.Module):
    """A learned factor for each of a number of equal runs of channels. It is no norm: it is linear,
    and always folds.

    Attributes:
        w: The factors, as many as there are runs.
        each: The length of a run.
    """

    def __init__(self, w: nn.Parameter, each: int = 1):
        super().__init__()
        self.w = w
        self.each = each

    @property
    def gain(self) -> Float[Tensor, " d"]:
        """What each channel is multiplied by."""
        return self.w if self.each == 1 else self.w.repeat_interleave(self.each)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Multiply."""
        return norm_layer(self, x, self.gain, None)

    def compute(
        self, x: Float[Tensor, "*batch d"], gain: Float[Tensor, " d"], bias: None
    ) -> Float[Tensor, "*batch d"]:
        """Multiply by this gain."""
        return x * gain

    def extra_repr(self) -> str:
        """How many factors there are, and for how many channels each."""
        return f"{len(self.w)} factors, each for {self.each} channels"


class FrozenNorm(_Constants):
    """Centre, divide by a constant: `LayerNormPre` (`RMSNormPre` without centring) made linear.

    Fires TransformerLens' `hook_scale` and `hook_normalized`, so that its tools run, and are exact.

    Attributes:
        centred: Whether the mean is subtracted.
        eps: What the live norm added to the variance. Not used here: it is kept for the way back,
            since `cfg.eps` of a model with these norms is NaN (`models.forms`).
    """

    def __init__(self, sigma: float, centred: bool, eps: float, first: float | None = None):
        super().__init__(sigma, first)
        require_positive(sigma)
        require_positive(sigma if first is None else first)
        self.centred = centred
        self.eps = eps
        self.remember()
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """As `LayerNormPre.forward`, with `hook_scale` [batch, pos, 1] constant."""
        return norm_layer(self, x, None, None)

    def compute(
        self, x: Float[Tensor, "*batch d_model"], gain: None, bias: None
    ) -> Float[Tensor, "*batch d_model"]:
        """The norm; there is no gain."""
        sigma = self._sigma(x)
        dtype, x = x.dtype, wide(x)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale(sigma)
        return self.hook_normalized(x / scale).to(dtype)

    def extra_repr(self) -> str:
        """The constant, and whether the mean is subtracted."""
        return f"{self._shown()}, centred={self.centred}"


class CRMSNormPre(nn.Module):
    """RMSNorm of a zero-mean vector of which the last entry is left out.

    x in d - 1 dimensions stands for (x, -sum(x)) in d: x / sqrt((sum x^2 + (sum x)^2) / d + eps).
    """

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.d = d
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        """As `RMSNormPre.forward`, over the vector that x stands for."""
        return norm_layer(self, x, None, None)

    def compute(
        self, x: Float[Tensor, "*batch length"], gain: None, bias: None
    ) -> Float[Tensor, "*batch length"]:
        """The norm; there is no gain."""
        dtype, x = x.dtype, wide(x)
        square = x.pow(2).sum(-1, keepdim=True) + x.sum(-1, keepdim=True).pow(2)
        scale = self.hook_scale((square / self.d + self.eps).sqrt())
        return self.hook_normalized(x / scale).to(dtype)
