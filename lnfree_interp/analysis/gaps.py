"""The gap: what holding something that is not affine misses, claims against measured effects.

With a live norm's scale held, parts add up to the whole, but a part is not what the whole loses
without it, since the scale would change. So the largest parts are taken out one by one, and the
model computes the whole without them. On an LN-free model the gap is zero.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.logit_targets import POSITIONS
from lnfree_interp.analysis.parts import Part, expand
from lnfree_interp.analysis.stream import Stream
from lnfree_interp.analysis.sublayers import GivenBlock
from lnfree_interp.analysis.targets import Reading
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.models.running import Edit
from lnfree_interp.numerics import MeasuredError, measure_error

MEASURED = 4
"""The number of parts whose effect is measured."""


def measured_gap(
    parts: Sequence[Part],
    stream: Stream,
    claims: Float[Tensor, "component batch number"],
    components: Sequence[Component],
    lost: Callable[[Stream], Float[Tensor, "batch number"]],
) -> MeasuredError:
    """What the largest parts claim against what the numbers lose without them.

    Args:
        parts: The parts of the stream, at the positions that are read.
        stream: The stream at these positions.
        claims: What every component claims to add to the numbers.
        components: The component of each row of the claims.
        lost: Computes what the numbers lose when another stream is read at these positions.
    """
    in_stream = [i for i, one in enumerate(components) if one.in_stream]
    size = claims[in_stream].abs().flatten(1).mean(1)
    largest = size.topk(min(MEASURED, len(size))).indices.tolist()
    rows = sorted(in_stream[i] for i in largest)
    vectors, _ = expand(parts, [components[row] for row in rows])
    return measure_error(claims[rows], torch.stack([lost(stream - v) for v in vectors]))


def target_gap(
    reading: Reading,
    parts: Sequence[Part],
    stream: Stream,
    claims: Float[Tensor, "component batch kept"],
    components: Sequence[Component],
) -> MeasuredError:
    """The gap of an attribution; for much text, it is measured at some of the positions, but for a
    number that is a sum over all of them."""
    n = stream.shape[1]
    some = slice(None) if n <= POSITIONS or reading.summed else slice(0, None, n // 64)

    def lost(changed: Stream) -> Float[Tensor, "batch number"]:
        return reading.total[:, some] - reading.again(changed[:, some], some)

    return measured_gap(parts, stream, claims[..., some], components, lost)


def token_gap(
    trace: Trace, reading: Reading, u: Stream, given: Collection[str] = ()
) -> MeasuredError:
    """What tokens claim of a target, carried back to them, against what it loses without them.

    The embeddings of the tokens that claim most are set to zero in turn. Patterns and gates are
    given in that run as well, and norms are not held, so the gap is due to the norms alone.

    Args:
        trace: The forward pass.
        reading: What the target reads.
        u: The direction that it reads, carried back to the embeddings.
        given: Sublayers whose output is given, through which it was not carried.
    """
    claims = torch.stack([torch.linalg.vecdot(x, u) for x in trace.embeds().values()]).sum(0)
    gone = claims.abs().topk(min(MEASURED, claims.shape[1])).indices
    edits: dict[str, Edit] = {}
    for layer in range(reading.place.layer + reading.place.mid):
        edits |= _given_edits(trace.block(layer), given)
    rows, losses = torch.arange(trace.batch, device=gone.device), []
    for at in gone.T:

        def leave_out(x: Tensor, at: Tensor = at) -> Tensor:
            return x.index_put((rows, at), torch.zeros((), dtype=x.dtype, device=x.device))

        without = {f"hook_{name}": leave_out for name in trace.embeds()}
        stop = min(reading.place.layer + 1, trace.view.n_layers)
        hook = reading.place.hook
        _, found = trace.view.run(trace.tokens, [hook], stop=stop, edits={**edits, **without})
        left = reading.again(reading.at.of(found[hook]), slice(None))
        losses.append((reading.total - left)[:, 0])
    return measure_error(claims.gather(1, gone), torch.stack(losses, dim=1))


def _given_edits(block: GivenBlock, given: Collection[str]) -> dict[str, Edit]:
    """What gives a block's pattern and gates, or all that a sublayer writes."""
    prefix, mlp = f"blocks.{block.layer}", block.mlp
    edits: dict[str, Edit] = {f"{prefix}.attn.hook_pattern": lambda x: block.pattern}
    if f"{block.layer}_attn_out" in given:
        edits[f"{prefix}.attn.hook_z"] = lambda x: block.z
    if mlp is None:
        return edits
    if f"{block.layer}_mlp_out" in given:
        return {**edits, f"{prefix}.mlp.hook_post": lambda x: mlp.post}
    linear: dict[str, Tensor] = {}

    def look(x: Tensor) -> None:
        linear["input"] = x

    def gate(x: Tensor) -> Tensor:
        return linear["input"] * mlp.gate + mlp.b_post

    return {**edits, mlp.linear: look, f"{prefix}.mlp.hook_post": gate}
