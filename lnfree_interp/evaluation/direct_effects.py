"""Is direct logit attribution what it claims to be? Attribution against measured direct effects.

The direct effect of a head is measured by taking its output out of the final residual stream and
running the rest of the model (final norm and unembedding) again. On an LN-free model the two are
equal; with a live norm, taking a part away changes the scale of all others.

Protocol of 2507.02559, section on direct logit attribution, with one difference: the target is the
true next token at every position; the published code took the logit of the current token.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.logits import attribute_next_tokens


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """Attribution and measured direct effect of every head, in logits of the true next token."""

    attribution: Float[Tensor, "layer head target"]
    measured: Float[Tensor, "layer head target"]

    @property
    def nmae_per_head(self) -> Float[Tensor, "layer head"]:
        """mean |attribution - measured| / mean |measured| over all targets; 0 for a dead head."""
        error = (self.attribution - self.measured).abs().mean(-1)
        return torch.where(error == 0, 0.0, error / self.measured.abs().mean(-1))

    @property
    def nmae(self) -> float:
        """The mean of `nmae_per_head`: the published headline, as a fraction."""
        return self.nmae_per_head.mean().item()

    @property
    def pooled_nmae(self) -> float:
        """One ratio over all heads and targets, which heads of large effect dominate."""
        error = (self.attribution - self.measured).abs().mean()
        return (error / self.measured.abs().mean()).item()


@torch.no_grad()
def direct_effects(
    model: HookedTransformer, tokens: Int[Tensor, "blocks pos"], batch: int = 4
) -> DirectEffects:
    """Attribution and measured direct effect of every head on the true next token.

    Args:
        model: LN-free or not; with a live final norm the attribution holds its scale, as
            direct logit attribution always does there.
        tokens: [blocks, pos]. Every position with a next token counts.
        batch: Blocks per forward pass.
    """
    chunks = [_of_batch(model, chunk.to(model.W_E.device)) for chunk in tokens.split(batch)]
    attribution, measured = (torch.cat(parts, dim=-1) for parts in zip(*chunks, strict=True))
    return DirectEffects(attribution, measured)


def _of_batch(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "layer head target"], Float[Tensor, "layer head target"]]:
    attribution = attribute_next_tokens(model, tokens, by="head", frozen_scale=True)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    heads = attribution.of_kind("head").flatten(1).unflatten(0, (n_layers, n_heads))

    resid_name = f"blocks.{n_layers - 1}.hook_resid_post"
    wanted = {resid_name, *(f"blocks.{layer}.attn.hook_z" for layer in range(n_layers))}
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in wanted)
    resid = cache[resid_name][:, :-1]
    targets = tokens[:, 1:, None]

    def target_logit(stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]:
        logits = model(stream, start_at_layer=n_layers)
        return logits.gather(-1, targets)[..., 0]

    with_all = target_logit(resid)
    measured = torch.empty_like(heads)
    for layer, block in enumerate(model.blocks):
        z = cache[f"blocks.{layer}.attn.hook_z"][:, :-1]
        for head in range(n_heads):
            output = z[:, :, head] @ block.attn.W_O[head]
            measured[layer, head] = (with_all - target_logit(resid - output)).flatten()
    return heads.cpu(), measured.cpu()
