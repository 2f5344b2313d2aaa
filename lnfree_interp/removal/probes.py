"""What is measured of a model in training: how large its residual stream and its gradients are."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
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


def block_weights(model: HookedTransformer) -> dict[str, list[nn.Parameter]]:
    """The weight matrices that every block has, by kind such as `attn.W_Q`, from the first layer.

    Whether they are trained does not matter.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for block in model.blocks:
        for name, W in block.named_parameters():
            room, _, leaf = name.rpartition(".")
            if leaf.lstrip("_").startswith("W_"):
                found.setdefault(f"{room}.{leaf.lstrip('_')}", []).append(W)
    every = [kind for kind, layers in found.items() if len(layers) == model.cfg.n_layers]
    return {kind: found[kind] for kind in sorted(every, key=_in_order)}


def _in_order(kind: str) -> int:
    """The place of a kind of weight along the data's way; others come last."""
    leaf = kind.rpartition(".")[2]
    order = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")
    return order.index(leaf) if leaf in order else len(order)


def gradient_sizes(
    weights: Mapping[str, list[nn.Parameter]], whole: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, list[float]]:
    """The mean absolute entry of each weight's gradient, by kind, from the first layer; 0 where a
    weight has none because it is not trained.

    Args:
        weights: As `block_weights` gives them, with gradients.
        whole: Makes one tensor of what is spread over processes.
    """
    found = {}
    for kind, layers in weights.items():
        means = [
            torch.zeros((), device=W.device) if W.grad is None else whole(W.grad.abs().mean())
            for W in layers
        ]
        found[kind] = torch.stack([mean.to(means[0].device) for mean in means]).tolist()
    return found
