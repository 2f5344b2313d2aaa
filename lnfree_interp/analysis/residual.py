"""The residual stream at any place as a sum of what was written to it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Contributions, Level
from lnfree_interp.analysis.parts import expand, project
from lnfree_interp.analysis.questions import (
    Prompt,
    read_position,
    read_prompts,
    strings,
)
from lnfree_interp.analysis.writes import (
    Place,
    require_decomposable,
    require_level,
    write_names,
    writes,
)
from lnfree_interp.errors import DataError
from lnfree_interp.models.running import run_and_keep


@torch.no_grad()
def decompose_residual(
    model: HookedTransformer,
    prompt: Prompt,
    at: str | None = None,
    *,
    pos: int | slice = -1,
    by: Level = "head",
    onto: Float[Tensor, "*batch d_model"] | None = None,
    prepend_bos: bool | None = None,
    attention_mask: Int[Tensor, "*prompt pos"] | Float[Tensor, "*prompt pos"] | None = None,
    biases: bool = False,
) -> Contributions:
    """The residual stream at one place, as the sum of embeddings, heads, neurons and biases.

    Exact on every model, LN-free or not: norms act on what sublayers read, never on the stream.

    Args:
        model: Any form.
        prompt: One prompt or several of the same length.
        at: A hook name such as `blocks.3.hook_resid_mid`. Default: the stream that the final norm
            reads.
        pos: Positions of the stream: one, or a slice.
        by: As in `attribute_logits`.
        onto: Project onto this direction, [d_model], instead of expanding every part: [component]
            numbers instead of vectors. Or one direction for each position, [pos, d_model].
        prepend_bos: As in `attribute_logits`.
        attention_mask: As in `attribute_logits`.
        biases: As in `attribute_logits`.

    Returns:
        Values [component, pos, d_model] for one prompt, [component, prompt, pos, d_model] for
        several; without `pos` for a single position, without `d_model` with `onto`. In the
        stream's own units; with `onto`, times the direction's length.

    Raises:
        DataError: if there is no such place, position or level, prompts differ in length, or the
            direction is not [..., d_model].
        UnsupportedModelError: for a model whose stream has other parts.

    Source:
        The residual stream as the sum of what is written to it: Elhage et al. 2021,
        https://transformer-circuits.pub/2021/framework.

    Examples:
        >>> at = "blocks.1.hook_resid_mid"
        >>> parts = lf.decompose_residual(model, "for i in", at, by="block").verify()
        >>> parts.labels
        ['embed', 'pos_embed', '0_attn_out', '0_mlp_out', '1_attn_out']
        >>> parts.values.shape
        torch.Size([5, 192])
    """
    require_level(by)
    require_decomposable(model)
    place = Place.last(model) if at is None else Place.parse(model, at)
    prompts = read_prompts(model, prompt, prepend_bos, attention_mask)
    groups = prompts.by_length()
    if len(groups) > 1:
        raise DataError("prompts differ in length: take the stream apart one prompt at a time")
    tokens = groups[0][1]
    n_pos = tokens.shape[1]
    if isinstance(pos, slice) and (pos.step or 1) < 0:
        raise DataError(f"{pos} runs backwards")
    if not isinstance(pos, slice):
        pos = read_position(pos, n_pos)
    positions = pos if isinstance(pos, slice) else slice(pos, pos + 1)
    names = [*write_names(model, by, place), place.hook]
    stop = min(place.layer + 1, model.cfg.n_layers)
    _, cache = run_and_keep(model, tokens, names, stop)
    total = cache[place.hook][:, positions]
    if total.shape[1] == 0:
        raise DataError(f"{pos} selects none of {n_pos} positions")
    parts = writes(model, cache, by, place, positions, biases=biases)
    if onto is None:
        values, components = expand(parts)
    else:
        onto = torch.as_tensor(onto)
        if onto.ndim == 0 or onto.shape[-1] != model.cfg.d_model:
            raise DataError(f"a direction has {model.cfg.d_model} entries, not {list(onto.shape)}")
        try:
            direction = onto.to(total).expand(total.shape).contiguous()
        except RuntimeError as error:
            raise DataError(
                f"directions {list(onto.shape)} do not fit a stream of {list(total.shape)}"
            ) from error
        values, components = project(parts, direction)
        total = torch.linalg.vecdot(total, direction)
    if isinstance(pos, int):
        values, total = values[:, :, 0], total[:, 0]
    whole = Contributions(
        values, components, total, by,
        of=(place.hook,) * len(tokens),
        prompts=tuple(tuple(strings(model, row.tolist())) for row in tokens),
        identity=f"parts = {place.hook}",
    )  # fmt: skip
    return whole.select(0) if prompts.single else whole
