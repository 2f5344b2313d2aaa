"""Ways to get a decomposition wrong, and the certificates that must notice.

    python tests/support/mutations.py

prints the table: for each mutation, which certificates of `lf.certify` fail on it.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import lnfree_interp as lf
from lnfree_interp.analysis import (
    affine,
    attention,
    flow,
    logits,
    neurons,
    paths,
    residual,
)
from lnfree_interp.analysis.gates import HeldLayer, hold
from lnfree_interp.analysis.parts import Constant, Dense, Heads, Neurons, Sources, Write
from lnfree_interp.analysis.reads import Read
from lnfree_interp.analysis.writes import writes
from lnfree_interp.evaluation import certify

OnWrite = Callable[[Write], Write]
OnLayer = Callable[[HeldLayer], HeldLayer]


def zero_bias(kind: str) -> OnWrite:
    def mutate(part: Write) -> Write:
        if isinstance(part, Constant) and part.components[0].kind == kind:
            return replace(part, biases=torch.zeros_like(part.biases))
        return part

    return mutate


def drop_b_V(model) -> OnWrite:
    def mutate(part: Write) -> Write:
        if isinstance(part, Heads):
            layer = part.components[0].layer
            return replace(part, z=part.z - model.blocks[layer].attn.b_V)
        return zero_bias("b_V")(part)

    return mutate


def wrong_positions(part: Write) -> Write:
    if isinstance(part, Dense) and part.components[0].kind == "pos_embed":
        return replace(part, x=part.x * 0.9)
    return part


def transposed_W_O(part: Write) -> Write:
    if isinstance(part, Heads | Sources):
        W = part.W_O.flatten(0, 1)
        return replace(part, W_O=W.T.contiguous().unflatten(0, part.W_O.shape[:2]))
    return part


def swapped_heads(part: Write) -> Write:
    if isinstance(part, Heads):
        return replace(part, z=part.z.flip(2))
    return replace(part, v=part.v.flip(2)) if isinstance(part, Sources) else part


def wrong_scale(part: Write) -> Write:
    """Of what the MLPs write, and each head."""
    if isinstance(part, Neurons):
        return replace(part, post=part.post * 1.01)
    if isinstance(part, Heads):
        return replace(part, z=part.z * 1.01)
    if isinstance(part, Sources):
        return replace(part, pattern=part.pattern * 1.01)
    return replace(part, x=part.x * 1.01) if isinstance(part, Dense) else part


def keep(part: Write) -> Write:
    return part


def on_layers(**change: Callable[[torch.Tensor], torch.Tensor]) -> OnLayer:
    def mutate(layer: HeldLayer) -> HeldLayer:
        return replace(layer, **{k: f(getattr(layer, k)) for k, f in change.items()})

    return mutate


def on_mlps(name: str) -> OnLayer:
    """A bias of the MLPs left out."""

    def mutate(layer: HeldLayer) -> HeldLayer:
        mlp = layer.mlp
        if mlp is None:
            return layer
        return replace(layer, mlp=replace(mlp, **{name: torch.zeros_like(getattr(mlp, name))}))

    return mutate


def _enlarged(self, right, x):
    return right(self, 1.01 * x)


def _transpose_heads(W):
    return W.flatten(0, 1).T.contiguous().unflatten(0, W.shape[:2])


# What each does to the parts of the stream, and to the network with held gates.
MUTATIONS: dict[str, tuple[Callable, OnLayer]] = {
    "drop b_V": (drop_b_V, on_layers(b_V=torch.zeros_like)),
    "drop b_O": (lambda model: zero_bias("b_O"), on_layers(b_O=torch.zeros_like)),
    "drop b_out": (lambda model: zero_bias("b_out"), on_mlps("b_out")),
    "wrong positions": (lambda model: wrong_positions, None),
    "wrong scale": (
        lambda model: wrong_scale,
        on_layers(z=lambda z: 1.01 * z, pattern=lambda pattern: 1.01 * pattern),
    ),
    "transposed W_O": (lambda model: transposed_W_O, on_layers(W_O=_transpose_heads)),
    "swapped heads": (lambda model: swapped_heads, on_layers(W_O=lambda W: W.flip(0))),
    "drop b_in": (lambda model: keep, on_mlps("b_in")),
    "wrong norm": (lambda model: keep, lambda layer: layer),
}


@contextlib.contextmanager
def mutated(model, name: str) -> Iterator[None]:
    """Every analysis, wrong in one way."""
    make, on_layer = MUTATIONS[name]
    on_write = make(model)

    def wrong_writes(*arguments, **settings):
        return (on_write(part) for part in writes(*arguments, **settings))

    def wrong_hold(model, tokens):
        network = hold(model, tokens)
        if on_layer is not None:
            return replace(network, layers=tuple(map(on_layer, network.layers)))
        embeds = dict(network.embeds)
        if "pos_embed" in embeds:
            embeds["pos_embed"] = embeds["pos_embed"] * 0.9
        return replace(network, embeds=embeds)

    with contextlib.ExitStack() as stack:
        if name == "wrong norm":  # whatever reads the stream reads it 1 % too large
            for method in ("forward", "back_unscaled", "weights_back"):
                right = getattr(Read, method)
                wrong = functools.partialmethod(_enlarged, right)
                stack.enter_context(mock.patch.object(Read, method, wrong))
        for module in (logits, residual, attention, neurons):
            stack.enter_context(mock.patch.object(module, "writes", wrong_writes))
        for module in (affine, paths, flow, certify):
            stack.enter_context(mock.patch.object(module, "hold", wrong_hold))
        yield


def verdicts(model) -> dict[str, dict[str, bool]]:
    """For each mutation (and none), which certificates hold."""
    table = {"none": {c.identity: c.holds for c in lf.certify(model)}}
    for name in MUTATIONS:
        with mutated(model, name):
            table[name] = {c.identity: c.holds for c in lf.certify(model)}
    return table


def main() -> None:
    from support.models import freeze_all, make_gpt2

    live = lf.load(make_gpt2(), dtype=torch.float64, check=False)
    model = lf.fold(freeze_all(live))
    table = verdicts(model)
    lines = ["| certificate | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
    for identity in table["none"]:
        row = ["holds" if table[name][identity] else "**fails**" for name in table]
        lines.append(f"| {identity} | " + " | ".join(row) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
