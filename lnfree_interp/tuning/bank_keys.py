"""Which bank a sequence is for: the cosine of its feature with a key for each domain."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.prompts import batches
from lnfree_interp.models.running import run


@dataclass(frozen=True)
class Keys:
    """A key for each domain, in the space of a frozen model's features."""

    layer: int
    """The feature of a sequence is the mean over its tokens of the stream before this block."""
    of: Mapping[str, Float[Tensor, " d_model"]] = field(default_factory=dict)
    """By domain, the mean direction of its sequences' features, of length 1, in float64."""

    def similarity(
        self, features: Float[Tensor, "sequence d_model"], domains: tuple[str, ...]
    ) -> Float[Tensor, "sequence domain"]:
        """The cosine of each feature with the key of each domain."""
        keys = torch.stack([self.of[domain].to(features.device) for domain in domains])
        return F.normalize(features, dim=-1) @ keys.T


def key_of(features: Float[Tensor, "sequence d_model"]) -> Float[Tensor, " d_model"]:
    """The key for a domain: the direction with the largest mean cosine with its features, which
    gradient descent on the cosine finds in the paper. (2308.09610)"""
    return F.normalize(F.normalize(features, dim=-1).mean(0), dim=-1)


@torch.no_grad()
def sequence_features(
    model: HookedTransformer, tokens: Int[Tensor, "sequence pos"], layer: int, batch: int
) -> Float[Tensor, "sequence d_model"]:
    """The mean over tokens of the stream before a block, in float64."""
    means = [
        run(model, rows, stop_at_layer=layer).double().mean(1) for rows in batches(tokens, batch)
    ]
    return torch.cat(means)
