"""Measures how large the residual stream and its activations are, with hooks."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint


class ResidualProbe:
    """Norms of `resid_post` in every layer, position 0 apart, and its largest entry.

    The mean over tokens hides a few tokens with a very large norm, on which the published XL model
    fails (2507.02559).
    """

    def __init__(self, model: HookedTransformer):
        self.layers = range(model.cfg.n_layers)
        self.seen: dict[str, list[Tensor]] = {}

    @property
    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """For `model.hooks(fwd_hooks=...)`; they change nothing."""
        return [(f"blocks.{layer}.hook_resid_post", self._look) for layer in self.layers]

    @torch.no_grad()
    def _look(self, resid: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
        assert hook.name is not None
        resid = resid.detach().float()
        norms = resid.norm(dim=-1)
        rest = norms[:, 1:]
        seen = torch.stack([norms[:, 0].mean(), rest.mean(), rest.max(), resid.abs().max()])
        self.seen.setdefault(hook.name, []).append(seen)

    def read(self) -> dict[str, Any]:
        """By layer: mean norm at position 0, mean and largest norm elsewhere, largest |entry|.

        They are those of this process over the forward passes since the last reading.
        """
        if not self.seen:
            return {}
        stacked = torch.stack([torch.stack(passes) for passes in self.seen.values()])
        self.seen = {}
        means, largest = stacked.mean(1), stacked.amax(1)
        return {
            "resid_norm_first": means[:, 0].tolist(),
            "resid_norm_mean": means[:, 1].tolist(),
            "resid_norm_max": largest[:, 2].tolist(),
            "largest_activation": largest[:, 3].max().item(),
        }
