"""Paths through attention: every way from a source to a logit, patterns given.

The logit is a sum over sources (embeddings, MLP outputs, biases); what a head adds is again a sum
over the sources that it read, moved by its pattern and by W_V W_O. Applied head by head this is the
path expansion of the circuits framework (Elhage et al. 2021), which without norms has no
approximation in it. There are far too many paths to list, so the largest are opened first, and what
was left closed stays in the sum with its exact value.
"""

import heapq
from collections.abc import Iterator
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Component, Contributions
from lnfree_interp.analysis.gaps import token_gap
from lnfree_interp.analysis.gates import Held, hold
from lnfree_interp.analysis.logit_reading import read_logit
from lnfree_interp.analysis.questions import Answer, Prompt
from lnfree_interp.analysis.reads import held
from lnfree_interp.errors import DataError

Weights = Float[Tensor, " pos"]


@torch.no_grad()
def expand_paths(
    model: HookedTransformer,
    prompt: Prompt,
    answer: Answer,
    against: Answer | None = None,
    *,
    top_k: int | None = 20,
    expansions: int = 200,
    prepend_bos: bool | None = None,
    frozen_scale: bool = False,
) -> Contributions:
    """A logit by paths: a source, and the heads that carried it to the last position.

    Patterns and the outputs of MLPs are given. A path is labelled `embed > L0H1 > L2H5`.

    Args:
        model: LN-free. The outputs of MLPs are sources; in an attention-only model every path
            starts at an embedding or a bias.
        prompt: One prompt.
        answer: As in `attribute_logits`, one.
        against: As in `attribute_logits`, one.
        top_k: Rows to list; the others are one row `rest`. None: all.
        expansions: Heads to open, those with the largest contribution first. One that was not
            opened is listed as a whole: `L0H1 > L2H5` is all that L2H5 got from L0H1. With enough
            of them everything is open: there are about (1 + heads) ** layers paths.
        prepend_bos: As in `attribute_logits`.
        frozen_scale: Hold live norms' scales; `.gap` measures what that misses, by taking out the
            tokens that claim most, patterns and the outputs of MLPs still held.

    Returns:
        Values [path], in logits, largest first, then `rest`; each is exact, and so is their sum.
        Biases are rows too. Where all rows are listed there is no `rest`.

    Raises:
        InexactError: if a norm is live or the logits are capped, and `frozen_scale` is False.
        DataError: as `attribute_logits`; for more than one prompt or answer, `top_k` less than one
            or negative `expansions`.
        UnsupportedModelError: as `attribute_logits`.

    Source:
        Path expansion: Elhage et al. 2021, https://transformer-circuits.pub/2021/framework. Ours:
        the largest heads are opened first, and what stays closed is summed.

    Examples:
        >>> paths = lf.expand_paths(free, "for i in", " range", top_k=3).verify()
        >>> len(paths), paths.labels[-1]
        (4, 'rest')
    """
    if expansions < 0 or (top_k is not None and top_k < 1):
        raise DataError("list at least one path, and open no less than none")
    nonlinear = held(model, frozen_scale)
    reading = read_logit(model, prompt, answer, against, prepend_bos)
    network = hold(model, reading.tokens)
    n_pos = reading.tokens.shape[1]
    last = torch.zeros(n_pos, dtype=reading.direction.dtype, device=reading.direction.device)
    last[-1] = 1
    done: list[tuple[Component, Tensor]] = list(reading.constants)
    closed: list[tuple[float, int, Component, Tensor, Weights, Tensor]] = []
    order = count()

    def open_up(
        weights: Weights, direction: Tensor, n_layers: int, via: tuple[Component, ...]
    ) -> None:
        for component, value in _sources(network, weights, direction, n_layers, via):
            done.append((component, value))
        for component, value, ahead in _heads(network, weights, direction, n_layers, via):
            size = -abs(value.item())
            heapq.heappush(closed, (size, next(order), component, value, weights, ahead))

    open_up(last, reading.direction, len(network.layers), ())
    for _ in range(expansions):
        if not closed:
            break
        _, _, head, _, weights, ahead = heapq.heappop(closed)
        assert head.layer is not None
        assert head.index is not None
        layer = network.layers[head.layer]
        via = (Component("head", head.layer, head.index), *head.through)
        # `ahead` is the direction as this head's output sees it.
        bias = Component("b_V", head.layer, head.index, through=head.through)
        done.append((bias, weights.sum() * (ahead @ layer.b_V[head.index])))
        read_weights, direction = layer.before.back_weighted(
            weights @ layer.pattern[0, head.index], layer.W_V[head.index] @ ahead
        )
        open_up(read_weights, direction, head.layer, via)
    rows = [*done, *((component, value) for _, _, component, value, _, _ in closed)]
    values = torch.stack([value for _, value in rows])
    order_of_size = values.abs().argsort(descending=True)
    listed = order_of_size if top_k is None else order_of_size[:top_k]
    rest = order_of_size[len(listed) :]
    components = [rows[i][0] for i in listed.tolist()]
    values_listed = values[listed]
    if len(rest):
        values_listed = torch.cat([values_listed, values[rest].sum()[None]])
        components.append(Component("rest"))
    return Contributions(
        values_listed, tuple(components), reading.total, "path", reading.of, reading.prompts,
        bool(nonlinear), "paths + rest = the model's logits, patterns given",
        token_gap(model, network, reading, through_mlps=False) if nonlinear else None,
    )  # fmt: skip


def _sources(
    network: Held, weights: Weights, direction: Tensor, n_layers: int, via: tuple[Component, ...]
) -> Iterator[tuple[Component, Tensor]]:
    """What lies in the stream before a block and is no head, by weight and direction."""
    for kind, x in network.embeds.items():
        yield Component(kind, through=via), weights @ (x[0] @ direction)
    for layer in network.layers[:n_layers]:
        yield Component("b_O", layer.layer, through=via), weights.sum() * (layer.b_O @ direction)
        if (mlp := layer.mlp) is not None:
            moved = weights @ mlp.post[0] @ (mlp.W_out @ direction)
            moved = moved + weights.sum() * (mlp.b_out @ direction)
            yield Component("mlp_out", layer.layer, through=via), moved


def _heads(
    network: Held, weights: Weights, direction: Tensor, n_layers: int, via: tuple[Component, ...]
) -> Iterator[tuple[Component, Tensor, Tensor]]:
    """The heads before a block: what each adds, and the direction as its output sees it."""
    for layer in network.layers[:n_layers]:
        ahead = layer.W_O @ direction
        values = torch.einsum("p,phk,hk->h", weights, layer.z[0], ahead)
        for head in range(len(ahead)):
            yield Component("head", layer.layer, head, through=via), values[head], ahead[head]
