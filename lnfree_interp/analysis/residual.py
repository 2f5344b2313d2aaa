"""The residual stream at any place, as the sum of what is written to it."""

from typing import Any, SupportsIndex

from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.attribute import attribute
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.parts import expand
from lnfree_interp.analysis.results import Contributions
from lnfree_interp.analysis.targets import Probe
from lnfree_interp.analysis.trace import Trace


@analysis
def decompose_residual(
    trace: Trace,
    at: str | None = None,
    *,
    pos: SupportsIndex | slice = -1,
    by: str | Level = "head",
    onto: Any = None,
    biases: bool = False,
) -> Contributions:
    """The residual stream at one place, as the sum of embeddings, heads, neurons and biases.

    It is exact on every model, LN-free or not: norms act on what sublayers read, not on the stream.

    Args:
        trace: A trace; or a model and a prompt, as two arguments.
        at: The hook name of the place, such as `blocks.3.hook_resid_mid`. Default: the stream that
            the final norm reads.
        pos: Positions of the stream: one, from each prompt's own end if negative; or a slice.
        by: How finely the model is taken apart, as in `attribute_logits`.
        onto: A direction to project onto, [d_model], or one for each position, [pos, d_model]. Each
            part is then a number instead of a vector.
        biases: Whether each head's value bias is a part of its own, by head and by neuron.

    Returns:
        Values [component, pos, d_model] for one prompt, [component, prompt, pos, d_model] for
        several; without `pos` for a single position, without `d_model` with `onto`. In the
        stream's own units; with `onto`, times the direction's length.

    Raises:
        DataError: if there is no such place, position or level, a slice is asked for of prompts
            that differ in length, or the direction is not [..., d_model].
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        The residual stream as the sum of what is written to it: Elhage et al. 2021,
        https://transformer-circuits.pub/2021/framework.

    Examples:
        >>> at = "blocks.1.hook_resid_mid"
        >>> parts = lf.decompose_residual(model, "for i in", at, by="sublayer").verify()
        >>> parts.labels
        ['embed', 'pos_embed', '0_attn_out', '0_mlp_out', '1_attn_out']
        >>> parts.values.shape
        torch.Size([5, 192])
    """
    if onto is not None:
        return attribute(trace, Probe(onto, at, pos), by, biases=biases)
    trace.require_text()
    chosen, place, positions = level(by), trace.view.place(at), trace.positions(pos)
    trace.need(place.hook, *chosen.needs(trace.view, place))
    values, components = expand(chosen.parts(trace, place, positions, biases))
    total, dims = positions.of(trace.stream(place)), ("prompt", "pos", "d_model")
    if not isinstance(pos, slice):
        values, total, dims = values[:, :, 0], total[:, 0], ("prompt", "d_model")
    whole = Contributions(
        values, components, total, chosen.name, dims, (place.hook,) * trace.batch, trace.prompts,
        unit="stream", identity=f"parts = {place.hook}",
    )  # fmt: skip
    return whole.select(prompt=0) if trace.single else whole
