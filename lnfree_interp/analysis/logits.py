"""Direct logit attribution: a logit as a sum over the parts of the model.

On an LN-free model the logit is linear in the residual stream, so the parts add up to it and
taking one away changes it by exactly that part. With a live final norm (or a soft cap) both need
the scale held at the value it had, and only the adding up survives.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Component, Contributions, Level
from lnfree_interp.analysis.gaps import largest
from lnfree_interp.analysis.logit_reading import (
    POSITIONS,
    given_run,
    logit_directions,
    logit_names,
    run_to_logits,
)
from lnfree_interp.analysis.parts import Write, expand, project
from lnfree_interp.analysis.questions import (
    Answers,
    Prompt,
    question_names,
    read_answers,
    read_blocks,
    read_prompts,
    strings,
)
from lnfree_interp.analysis.reads import Activations, held
from lnfree_interp.analysis.writes import (
    Place,
    require_decomposable,
    require_level,
    write_names,
    writes,
)
from lnfree_interp.errors import DataError
from lnfree_interp.models.agreement import require_tokens
from lnfree_interp.numerics import MeasuredError, measure_error


def attribute_logits(
    model: HookedTransformer,
    prompt: Prompt,
    answer: Answers,
    against: Answers | None = None,
    *,
    by: Level = "head",
    prepend_bos: bool | None = None,
    attention_mask: Int[Tensor, "*prompt pos"] | Float[Tensor, "*prompt pos"] | None = None,
    biases: bool = False,
    frozen_scale: bool = False,
) -> Contributions:
    """What each part of the model adds to the next token's logit, or logit difference.

    Args:
        model: LN-free, folded or with frozen norm sites; of the norms only the final one matters.
        prompt: One prompt, or several that need not be equally long; or token ids.
        answer: The next token: a string that is one token (mind the leading space) or a token id.
            One for all prompts, one each, or several each; several for one prompt.
        against: Subtract this token's logit. As `answer`.
        by: How finely. `"layer"`; `"block"`, attention and MLP of each layer; `"head"`, attention
            by head, its output bias b_O apart; `"source"`, each head by the token that it reads,
            its value bias b_V apart; `"neuron"`, as head, and MLPs by neuron, their bias b_out
            apart.
        prepend_bos: Start each prompt with the beginning-of-sequence token; not added to ids.
            Default: as the model does, `cfg.default_prepend_bos`.
        attention_mask: 0 where a row of token ids is padding, on either side.
        biases: Each head's value bias as a part of its own, by head and by neuron. Without, it is
            in the head's part.
        frozen_scale: Answer for a model with a live final norm too, holding its scale, or a soft
            cap's slope; `.gap` measures what that misses.

    Returns:
        Values [component] for one prompt, [component, prompt] for several, with a last dimension
        [answer] where several were asked for; in logits. By source, a prompt that is shorter than
        the longest has zeros where it has no token.

    Raises:
        InexactError: if the final norm is live or the logits are capped, and `frozen_scale` is
            False.
        DataError: if a prompt is empty or longer than the context, token ids are padded without a
            mask, an answer is not one token, or is its own `against`, the numbers of prompts and
            answers differ, or there is no such level.
        UnsupportedModelError: for a model whose stream has other parts.

    Source:
        Elhage et al. 2021, https://transformer-circuits.pub/2021/framework; exact on LN-free
        models: arXiv 2409.13710, arXiv 2507.02559. The gap is ours.

    Examples:
        >>> dla = lf.attribute_logits(free, "for i in", " range", by="head").verify()
        >>> dla.values.shape, dla.labels[:3]
        (torch.Size([35]), ['embed', 'pos_embed', 'L0H0'])
        >>> lf.attribute_logits(free, ["for i in", "for"], " range", " len").values.shape
        torch.Size([35, 2])
    """
    prompts = read_prompts(model, prompt, prepend_bos, attention_mask)
    n_prompts = len(prompts.rows)
    answers, several = read_answers(model, answer, n_prompts, prompts.single)
    foils = None
    if against is not None:
        foils, _ = read_answers(model, against, n_prompts, prompts.single, "foil")
        try:
            foils = foils.expand_as(answers)
        except RuntimeError as error:
            raise DataError(f"{answers.shape[1]} answers, but {foils.shape[1]} foils") from error
    questions = question_names(model, answers, foils)
    parts: list[tuple[list[int], Contributions]] = []
    for places, tokens in prompts.by_length():
        minus = None if foils is None else foils[places]
        part = _attribute(
            model, tokens, slice(-1, None), answers[places], minus, by, biases, frozen_scale
        )
        parts.append((places, part))
    longest = parts[-1][1]
    rows = {component: row for row, component in enumerate(longest.components)}
    values = longest.values.new_zeros(len(rows), n_prompts, answers.shape[1])
    total = longest.total.new_zeros(n_prompts, answers.shape[1])
    for places, part in parts:
        into = torch.tensor([rows[component] for component in part.components])
        values[into[:, None], torch.tensor(places)] = part.values
        total[places] = part.total
    whole = Contributions(
        values=values if several else values[..., 0],
        components=longest.components,
        total=total if several else total[..., 0],
        level=by,
        of=tuple(", ".join(names) for names in questions),
        prompts=tuple(tuple(strings(model, row.tolist())) for row in prompts.rows),
        frozen_scale=longest.frozen_scale,
        gap=_worst(part.gap for _, part in parts),
        answers=questions if several else (),
    )
    return whole.select(0) if prompts.single else whole


def attribute_next_tokens(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    *,
    by: Level = "head",
    biases: bool = False,
    frozen_scale: bool = False,
    run: tuple[Tensor, Activations] | None = None,
) -> Contributions:
    """What each part adds to the logit of the true next token, at every position.

    Args:
        model: As for `attribute_logits`.
        tokens: Token ids [batch, pos], rows of text without padding.
        by: As for `attribute_logits`.
        biases: As for `attribute_logits`.
        frozen_scale: As for `attribute_logits`.
        run: What `model.run_with_cache(tokens)` returned, if it is there already.

    Returns:
        Values [component, batch, pos - 1], in logits.

    Raises:
        InexactError, UnsupportedModelError: as `attribute_logits`.
        DataError: if the rows have no next token, or the model cannot read them; if `run` lacks
            an activation, or is of other tokens; or if there is no such level.

    Source:
        As `attribute_logits`: Elhage et al. 2021,
        https://transformer-circuits.pub/2021/framework; arXiv 2409.13710.

    Examples:
        >>> dla = lf.attribute_next_tokens(free, tokens, by="block").verify()
        >>> dla.values.shape
        torch.Size([11, 4, 63])
        >>> dla["3_mlp_out"].mean(0).shape
        torch.Size([63])
    """
    tokens = read_blocks(model, tokens)
    return _attribute(
        model, tokens, slice(0, -1), tokens[:, 1:], None, by, biases, frozen_scale, run
    )


def _worst(errors: Iterable[MeasuredError | None]) -> MeasuredError | None:
    return max((e for e in errors if e is not None), key=lambda e: e.relative, default=None)


@torch.no_grad()
def _attribute(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    positions: slice,
    targets: Int[Tensor, "batch kept"],
    against: Int[Tensor, "batch kept"] | None,
    by: Level,
    biases: bool,
    frozen_scale: bool,
    run: tuple[Tensor, Activations] | None = None,
) -> Contributions:
    """Of targets at positions, or of several targets at one position."""
    require_level(by)
    require_decomposable(model)
    require_tokens(model, tokens)
    nonlinear = held(model, frozen_scale, ["ln_final"])
    targets = targets.to(model.W_E.device)
    against = None if against is None else against.to(model.W_E.device)
    repeat = targets.shape[1] if positions == slice(-1, None) else 1
    place = Place.last(model)
    names = [*write_names(model, by, place), *logit_names(model)]
    if nonlinear:
        names.append(place.hook)
    if run is None:
        cache, logits = run_to_logits(model, tokens, positions, names, targets, against)
    else:
        cache, logits = given_run(model, tokens, run, positions, names, targets, against)
    direction, constants = logit_directions(model, cache, logits, targets, against)
    parts = writes(model, cache, by, place, positions, repeat, biases)
    values, components = project(parts, direction, constants)
    total = logits[0] if against is None else logits[0] - logits[1]
    gap, of = None, ()
    if positions != slice(-1, None):
        of = ("each next token",) * len(tokens)
    if nonlinear:
        parts = writes(model, cache, by, place, positions, repeat, biases)
        stream = cache[place.hook][:, positions].expand(-1, total.shape[1], -1)
        gap = _measured_gap(model, parts, values, components, stream, total, targets, against)
    return Contributions(values, components, total, by, of, frozen_scale=bool(nonlinear), gap=gap)


def _measured_gap(
    model: HookedTransformer,
    parts: Iterable[Write],
    values: Float[Tensor, "component batch kept"],
    components: tuple[Component, ...],
    stream: Float[Tensor, "batch kept d_model"],
    total: Float[Tensor, "batch kept"],
    targets: Int[Tensor, "batch kept"],
    against: Int[Tensor, "batch kept"] | None,
) -> MeasuredError:
    """What the largest parts claim against what the logit loses without them."""
    rows = largest(values, components)
    vectors, _ = expand(parts, [components[row] for row in rows])
    kept = slice(None) if stream.shape[1] <= POSITIONS else slice(0, None, stream.shape[1] // 64)
    losses = []
    for vector in vectors:
        without = (stream - vector)[:, kept]
        logits = model(without.flatten(0, 1)[:, None], start_at_layer=model.cfg.n_layers)[:, 0]
        changed = logits.gather(-1, targets[:, kept].flatten()[:, None])
        if against is not None:
            changed = changed - logits.gather(-1, against[:, kept].flatten()[:, None])
        losses.append(total[:, kept] - changed.reshape(total[:, kept].shape))
    return measure_error(values[rows][:, :, kept], torch.stack(losses))
