"""The maps that can stand at a norm site: LayerNorm, live or frozen.

Live, a norm divides by each token's own standard deviation. Frozen, it divides by one constant:

    x -> ((x - mean(x)) / sigma) * w + b

which is affine in x, and so folds into the weights that read it (`models.folding`). The hook names
are TransformerLens': `hook_scale` [batch, pos, 1] is what is divided by, `hook_normalized`
[batch, pos, d_model] the quotient before gain and bias. A frozen norm fires both, with the
constant at full shape.

Source of the frozen form: "You can remove GPT2's LayerNorm by fine-tuning", arXiv 2409.13710.

`FrozenNorm` is what a finished model keeps of it when gain and bias are folded away.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.components import LayerNorm
from transformer_lens.hook_points import HookPoint

from lnfree_interp.errors import NormSiteError


class Norm(nn.Module):
    """A LayerNorm that can be frozen.

    Attributes:
        w: Gain, [d_model].
        b: Bias, [d_model].
        eps: Added to the variance while live.
        sigma: The constant that a frozen norm divides by, a scalar; NaN while live.
    """

    def __init__(self, norm: LayerNorm):
        super().__init__()
        self.w = norm.w
        self.b = norm.b
        self.eps = norm.eps
        self.register_buffer("sigma", torch.full((), torch.nan, dtype=torch.float64))
        self._frozen = False
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    sigma: Tensor

    @property
    def frozen(self) -> bool:
        """Whether the norm divides by a constant."""
        return self._frozen

    def freeze(self, sigma: float) -> None:
        """Divide by `sigma` from now on.

        Raises:
            NormSiteError: if sigma is not a positive finite number.
        """
        if not 0 < sigma < float("inf"):
            raise NormSiteError(f"sigma must be positive and finite, not {sigma}")
        self.sigma.fill_(sigma)
        self._frozen = True

    def thaw(self) -> None:
        """Divide by each token's own standard deviation again."""
        self.sigma.fill_(torch.nan)
        self._frozen = False

    @property
    def hooked(self) -> bool:
        """Whether anybody reads or changes an activation inside this norm."""
        return self.hook_scale.has_hooks() or self.hook_normalized.has_hooks()

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalise over the last dimension; in one kernel when nobody looks inside."""
        if not self.hooked:
            if not self._frozen:
                return F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)
            gain = self.w / self.sigma.to(self.w)
            return torch.addcmul(self.b, x - x.mean(-1, keepdim=True), gain)
        # As TransformerLens: squares of half-precision activations overflow.
        dtype, x = x.dtype, x if x.dtype == torch.float64 else x.float()
        centred = x - x.mean(-1, keepdim=True)
        if self._frozen:
            scale = self.sigma.to(x).expand(*x.shape[:-1], 1)
        else:
            scale = (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return self.hook_normalized(centred / self.hook_scale(scale)).to(dtype) * self.w + self.b

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._frozen = not bool(self.sigma.isnan())

    def extra_repr(self) -> str:
        """Live, or the constant."""
        return f"sigma={self.sigma.item():.4g}" if self._frozen else "live"


class SplitNorm(nn.Module):
    """A block's `ln1` as two sites, one read by queries and keys, one by values.

    Gain and bias are shared, as they are in the pretrained norm; what can differ is whether a site
    is frozen, and its sigma. The published order freezes `qk` in every layer before the first `v`.
    """

    def __init__(self, norm: LayerNorm):
        super().__init__()
        self.qk = Norm(norm)
        self.v = Norm(norm)

    def forward(
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch d_model"]]:
        """The input of queries and keys, and that of values; one tensor while they are the same."""
        x_qk = self.qk(x)
        both_live = not (self.qk.frozen or self.v.frozen)
        if both_live and not (self.qk.hooked or self.v.hooked):
            return x_qk, x_qk
        return x_qk, self.v(x)


class FrozenNorm(nn.Module):
    """Centre, divide by a constant: `LayerNormPre` (`RMSNormPre` without centring) made linear.

    Fires TransformerLens' `hook_scale` and `hook_normalized`, so that its tools run, and are exact.

    Attributes:
        sigma: The constant, a scalar.
        centred: Whether the mean is subtracted.
    """

    def __init__(self, sigma: float, centred: bool, dtype: torch.dtype = torch.float32):
        super().__init__()
        if not 0 < sigma < float("inf"):
            raise NormSiteError(f"sigma must be positive and finite, not {sigma}")
        self.centred = centred
        self.dtype = dtype
        self.register_buffer("sigma", torch.tensor(sigma, dtype=torch.float64))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    sigma: Tensor

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """As `LayerNormPre.forward`, with `hook_scale` [batch, pos, 1] constant."""
        x = x if x.dtype == torch.float64 else x.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale(self.sigma.to(x).expand(*x.shape[:-1], 1))
        return self.hook_normalized(x / scale).to(self.dtype)

    def extra_repr(self) -> str:
        """The constant, and whether the mean is subtracted."""
        return f"sigma={self.sigma.item():.4g}, centred={self.centred}"
