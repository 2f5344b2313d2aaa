"""What holding something that is not linear costs: claims against measured effects.

With a live norm's scale held, parts add up to the whole and yet say nothing exact about it:
without a part, the scale would be another. So the largest parts are taken out and the model is
asked. On an LN-free model the same measurement is zero.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from lnfree_interp.analysis.contributions import Component
from lnfree_interp.analysis.gates import Held, HeldLayer
from lnfree_interp.analysis.logit_reading import LogitReading
from lnfree_interp.models.running import run_hooked
from lnfree_interp.numerics import MeasuredError, measure_error

MEASURED = 4
"""Parts whose effect is measured."""
_NOT_IN_STREAM = ("ln1.b", "ln2.b", "ln_final.b", "b_Q", "b_K", "b_U", "b_in")


def largest(
    values: Float[Tensor, "component *batch"], components: Sequence[Component]
) -> list[int]:
    """The rows of the parts of the stream that claim most on average, in their own order."""
    in_stream = [i for i, one in enumerate(components) if one.kind not in _NOT_IN_STREAM]
    size = values[in_stream].abs().flatten(1).mean(1)
    chosen = size.topk(min(MEASURED, len(size))).indices.tolist()
    return sorted(in_stream[i] for i in chosen)


@torch.no_grad()
def token_gap(
    model: HookedTransformer, network: Held, reading: LogitReading, through_mlps: bool = True
) -> MeasuredError:
    """What tokens claim of a logit, carried back with everything held, against what it loses.

    The embeddings of the tokens that claim most are set to zero in turn. Patterns and gates are
    held in that run as well, norms are not: the gap is theirs alone.

    Args:
        model: In any form.
        network: Its held run.
        reading: The logit.
        through_mlps: False: what MLPs write is held too.
    """
    u = reading.spread(network.streams[-1])
    for *_, before in network.back(u, through_mlps):
        u = before
    claims = torch.stack([torch.linalg.vecdot(x, u)[0] for x in network.embeds.values()]).sum(0)
    gone = claims.abs().topk(min(MEASURED, len(claims))).indices
    rows = torch.arange(len(gone), device=gone.device)

    def leave_out(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[rows, gone] = 0
        return x

    hooks = [(f"hook_{name}", leave_out) for name in network.embeds]
    for layer in network.layers:
        hooks += _hold(layer, through_mlps)
    tokens = reading.tokens.expand(len(gone), -1)
    stream = run_hooked(model, tokens, hooks, model.cfg.n_layers)
    logits = model(stream[:, -1:], start_at_layer=model.cfg.n_layers)[:, -1]
    left = logits[:, reading.answer]
    if reading.foil is not None:
        left = left - logits[:, reading.foil]
    return measure_error(claims[gone], reading.total - left)


def _hold(layer: HeldLayer, through_mlps: bool) -> list[tuple]:
    """Hooks that hold a block's pattern, and its gates or all that its MLP writes."""
    prefix = f"blocks.{layer.layer}"
    hooks: list[tuple] = [
        (f"{prefix}.attn.hook_pattern", lambda x, hook: layer.pattern.expand_as(x))
    ]
    mlp = layer.mlp
    if mlp is None:
        return hooks
    if not through_mlps:
        return [*hooks, (f"{prefix}.mlp.hook_post", lambda x, hook: mlp.post.repeat(len(x), 1, 1))]
    linear: dict[str, Tensor] = {}

    def look(x: Tensor, hook: HookPoint) -> None:
        linear["input"] = x

    def gate(x: Tensor, hook: HookPoint) -> Tensor:
        return linear["input"] * mlp.gate + mlp.b_post

    return [*hooks, (mlp.linear, look), (f"{prefix}.mlp.hook_post", gate)]
