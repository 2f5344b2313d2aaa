"""sigma: the constant that takes the place of a token's own standard deviation."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from lnfree_interp.models.sites import NormSite, get_norm

Hooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., object]]]
"""TransformerLens' own form: (name or filter, function of the activation and `hook`)."""

_MEASURING_BATCH = 4


@torch.no_grad()
def measure_sigma(
    model: HookedTransformer,
    sites: Iterable[NormSite | str],
    tokens: Int[Tensor, "blocks pos"],
    fwd_hooks: Hooks = (),
) -> dict[str, float]:
    """The mean of each site's `hook_scale` over live text: the arithmetic mean over all tokens of
    sqrt(variance + eps), as in 2507.02559.

    Args:
        model: With norm sites; the sites to measure must be live to give anything new.
        sites: The sites to measure.
        tokens: [blocks, pos], the text to measure on.
        fwd_hooks: Active while measuring, as in `run_with_hooks`.

    Returns:
        From site name to sigma.

    Raises:
        NormSiteError: if the model lacks a site.
    """
    sums = {str(site): 0.0 for site in sites}
    for name in sums:
        get_norm(model, name)

    def accumulate(scale: Float[Tensor, "batch pos one"], hook: HookPoint) -> None:
        assert hook.name is not None
        sums[hook.name.removesuffix(".hook_scale")] += scale.double().sum().item()

    probes = [(f"{name}.hook_scale", accumulate) for name in sums]
    with model.hooks(fwd_hooks=[*fwd_hooks, *probes]):
        for batch in tokens.split(_MEASURING_BATCH):
            model(batch, return_type=None)
    return {name: total / tokens.numel() for name, total in sums.items()}
