"""What a logit reads from the final residual stream, and what biases add behind it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Component
from lnfree_interp.analysis.questions import (
    Answers,
    Prompt,
    question_names,
    read_answers,
    read_one_prompt,
    strings,
)
from lnfree_interp.analysis.reads import Activations, read, read_names
from lnfree_interp.analysis.writes import require_decomposable
from lnfree_interp.errors import DataError
from lnfree_interp.models.running import run_and_keep

_SCALE, _UNCAPPED = "ln_final.hook_scale", "unembed.hook_out"
POSITIONS = 128
"""Positions whose logits are held at once."""


def logit_names(model: HookedTransformer) -> list[str]:
    """The activations that `logit_directions` needs."""
    capped = model.cfg.output_logits_soft_cap > 0
    return read_names(model, ["ln_final"]) + [_UNCAPPED] * capped


@dataclass(frozen=True, eq=False)
class LogitReading:
    """One logit, or a difference of two, after one prompt: what it reads from the last stream."""

    tokens: Int[Tensor, "1 pos"]
    answer: int
    foil: int | None
    direction: Float[Tensor, " d_model"]
    """At the last position."""
    constants: tuple[tuple[Component, Float[Tensor, ""]], ...]
    """What biases behind the stream add."""
    total: Float[Tensor, ""]
    of: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]

    def spread(self, stream: Float[Tensor, "1 pos d_model"]) -> Float[Tensor, "1 pos d_model"]:
        """The direction in the shape of a stream: it reads the last position only."""
        u = torch.zeros_like(stream)
        u[:, -1] = self.direction
        return u


@torch.no_grad()
def read_logit(
    model: HookedTransformer,
    prompt: Prompt,
    answer: Answers,
    against: Answers | None,
    prepend_bos: bool | None,
) -> LogitReading:
    """For analyses that go further back than the last stream.

    Raises:
        DataError: if there is more than one prompt or answer, or as `attribute_logits`.
        UnsupportedModelError: as `attribute_logits`.
    """
    require_decomposable(model)
    tokens = read_one_prompt(model, prompt, prepend_bos)
    answers, _ = read_answers(model, answer, 1, True)
    foils = None if against is None else read_answers(model, against, 1, True, "foil")[0]
    if answers.shape[1] != 1 or (foils is not None and foils.shape[1] != 1):
        raise DataError("one answer at a time")
    of = question_names(model, answers, foils)[0]
    answers = answers.to(tokens.device)
    foils = None if foils is None else foils.to(tokens.device)
    names = logit_names(model)
    cache, logits = run_to_logits(model, tokens, slice(-1, None), names, answers, foils)
    direction, constants = logit_directions(model, cache, logits, answers, foils)
    total = logits[0] if foils is None else logits[0] - logits[1]
    return LogitReading(
        tokens, int(answers), None if foils is None else int(foils), direction[0, 0],
        tuple((component, value[0, 0]) for component, value in constants),
        total[0, 0], of, (tuple(strings(model, tokens[0].tolist())),),
    )  # fmt: skip


Picked = Float[Tensor, "which batch kept"]
"""Logits of the targets and, if there are any, of what is subtracted."""


def run_to_logits(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    positions: slice,
    names: list[str],
    targets: Int[Tensor, "batch kept"],
    against: Int[Tensor, "batch kept"] | None,
) -> tuple[dict[str, Tensor], Picked]:
    """One forward pass, whose logits are never all there at once."""
    n_layers = model.cfg.n_layers
    resid, found = run_and_keep(model, tokens, names, n_layers)
    kept, picked, uncapped, scales = resid[:, positions], [], [], []
    for start in range(0, kept.shape[1], POSITIONS):
        chunk = slice(start, start + POSITIONS)
        logits, ends = run_and_keep(
            model, kept[:, chunk], (_SCALE, _UNCAPPED), start_at_layer=n_layers
        )
        one = kept.shape[1] == 1
        wanted = targets if one else targets[:, chunk]
        foils = against if one or against is None else against[:, chunk]
        picked.append(_pick(logits, wanted, foils))
        if _UNCAPPED in names:
            uncapped.append(_pick(ends[_UNCAPPED], wanted, foils))
        if _SCALE in names:
            scales.append(ends[_SCALE])
    if scales:
        found[_SCALE] = torch.cat(scales, dim=1)
    if uncapped:
        found[_UNCAPPED] = torch.cat(uncapped, dim=-1)
    return found, torch.cat(picked, dim=-1)


def given_run(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    run: tuple[Tensor, Activations],
    positions: slice,
    names: list[str],
    targets: Int[Tensor, "batch kept"],
    against: Int[Tensor, "batch kept"] | None,
) -> tuple[dict[str, Tensor], Picked]:
    """The same from a run that the caller made."""
    logits, cache = run
    if missing := [name for name in names if name not in cache]:
        raise DataError(f"the run's cache lacks {missing[0]} (and {len(missing) - 1} more)")
    found = {name: cache[name] for name in names}
    embed = model.embed(tokens)
    if found["hook_embed"].shape != embed.shape or not torch.equal(found["hook_embed"], embed):
        raise DataError("the run is of other tokens, or something changed its embeddings")
    if _SCALE in found:
        found[_SCALE] = found[_SCALE][:, positions]
    if _UNCAPPED in found:
        found[_UNCAPPED] = _pick(found[_UNCAPPED][:, positions], targets, against)
    return found, _pick(logits[:, positions], targets, against)


def _pick(
    logits: Float[Tensor, "batch pos d_vocab"],
    targets: Int[Tensor, "batch kept"],
    against: Int[Tensor, "batch kept"] | None,
) -> Picked:
    """One token's logit per position, or several tokens' at the one position there is."""

    def of(tokens: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            return logits[:, 0].gather(-1, tokens)
        return logits.gather(-1, tokens[..., None])[..., 0]

    return torch.stack([of(tokens) for tokens in (targets, against) if tokens is not None])


def target_logits(
    model: HookedTransformer,
    stream: Float[Tensor, "batch kept d_model"],
    targets: Int[Tensor, "batch kept"],
) -> tuple[Float[Tensor, "batch kept"], Int[Tensor, "batch kept"]]:
    """What final norm and unembedding make of a stream: one logit per position, and the token of
    the largest; for a few positions at a time."""
    found, top = [], []
    for some, wanted in zip(
        stream.split(POSITIONS, dim=1), targets.split(POSITIONS, dim=1), strict=True
    ):
        logits = model(some, start_at_layer=model.cfg.n_layers)
        found.append(logits.gather(-1, wanted[..., None])[..., 0])
        top.append(logits.argmax(-1))
    return torch.cat(found, dim=1), torch.cat(top, dim=1)


def logit_directions(
    model: HookedTransformer,
    cache: Activations,
    logits: Picked,
    targets: Int[Tensor, "batch kept"],
    against: Int[Tensor, "batch kept"] | None,
) -> tuple[
    Float[Tensor, "batch kept d_model"], list[tuple[Component, Float[Tensor, "batch kept"]]]
]:
    """What a logit, or the difference of two, reads from the stream, and what biases add to it."""
    final = read(model, cache, "ln_final")
    # A cap holds the slope of what it let through.
    slopes = torch.ones_like(logits)
    if _UNCAPPED in cache:
        slopes = torch.where(cache[_UNCAPPED] == 0, 1.0, logits / cache[_UNCAPPED])
    direction, bias = model.W_U.new_zeros(()), model.b_U.new_zeros(())
    for sign, tokens, slope in zip((1, -1), (targets, against), slopes, strict=False):
        slope = sign * slope
        direction = direction + model.W_U.T[tokens] * slope[..., None]
        bias = bias + model.b_U[tokens] * slope
    constants = [(Component("b_U"), bias)]
    if final.bias is not None:
        constants.insert(0, (Component("ln_final.b"), direction @ final.bias))
    return final.back(direction), constants
