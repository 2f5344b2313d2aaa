"""Ways to get a decomposition wrong, and the certificates that must notice.

    python tests/support/mutations.py

prints the table: for each mutation, which certificates of `lf.certify` fail on it.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import lnfree_interp as lf
from lnfree_interp.analysis import levels
from lnfree_interp.analysis.hooked import HookedView
from lnfree_interp.analysis.parts import Constant, Dense, Heads, Part, Rows, Sources
from lnfree_interp.analysis.stream import Read
from lnfree_interp.analysis.sublayers import GivenBlock
from lnfree_interp.analysis.trace import Trace

OnPart = Callable[[Part, Trace], Part]
OnBlock = Callable[[GivenBlock], GivenBlock]


def zero_bias(kind: str) -> OnPart:
    def mutate(part: Part, trace: Trace) -> Part:
        if isinstance(part, Constant) and part.components[0].kind == kind:
            return replace(part, biases=torch.zeros_like(part.biases))
        return part

    return mutate


def drop_b_V(part: Part, trace: Trace) -> Part:
    if isinstance(part, Heads):
        return replace(part, z=part.z - trace.view.value_bias(part.components[0].layer))
    return zero_bias("b_V")(part, trace)


def wrong_positions(part: Part, trace: Trace) -> Part:
    if isinstance(part, Dense) and part.components[0].kind == "pos_embed":
        return replace(part, x=part.x * 0.9)
    return part


def transposed_W_O(part: Part, trace: Trace) -> Part:
    if isinstance(part, Heads | Sources):
        return replace(part, attention=_transposed(part.attention))
    return part


def swapped_heads(part: Part, trace: Trace) -> Part:
    if isinstance(part, Heads):
        return replace(part, z=part.z.flip(2))
    return replace(part, v=part.v.flip(2)) if isinstance(part, Sources) else part


def wrong_scale(part: Part, trace: Trace) -> Part:
    """Of what the MLPs write, and each head."""
    if isinstance(part, Rows):
        return replace(part, acts=part.acts * 1.01)
    if isinstance(part, Heads):
        return replace(part, z=part.z * 1.01)
    if isinstance(part, Sources):
        return replace(part, pattern=part.pattern * 1.01)
    return replace(part, x=part.x * 1.01) if isinstance(part, Dense) else part


def keep(part: Part, trace: Trace) -> Part:
    return part


def on_blocks(**change: Callable[[torch.Tensor], torch.Tensor]) -> OnBlock:
    def mutate(block: GivenBlock) -> GivenBlock:
        return replace(block, **{k: f(getattr(block, k)) for k, f in change.items()})

    return mutate


def on_mlps(**change: Callable) -> OnBlock:
    """Of the MLPs."""

    def mutate(block: GivenBlock) -> GivenBlock:
        mlp = block.mlp
        if mlp is None:
            return block
        return replace(
            block, mlp=replace(mlp, **{k: f(getattr(mlp, k)) for k, f in change.items()})
        )

    return mutate


def _enlarged(self, right, x):
    return right(self, 1.01 * x)


def _transposed(attention):
    W = attention.W_O
    return replace(attention, W_O=W.flatten(0, 1).T.contiguous().unflatten(0, W.shape[:2]))


def _without_b_out(weights):
    return replace(weights, b_out=torch.zeros_like(weights.b_out))


def _zero(*names):
    return lambda attention: replace(
        attention, **{name: torch.zeros_like(getattr(attention, name)) for name in names}
    )


def _flipped_W_O(attention):
    return replace(attention, W_O=attention.W_O.flip(0))


# What each does to the parts of the stream, and to the blocks whose patterns and gates are given.
MUTATIONS: dict[str, tuple[OnPart, OnBlock | None]] = {
    "drop b_V": (drop_b_V, on_blocks(b_V=torch.zeros_like)),
    "drop b_O": (zero_bias("b_O"), on_blocks(attention=_zero("b_O"))),
    "drop b_out": (zero_bias("b_out"), on_mlps(weights=_without_b_out)),
    "wrong positions": (wrong_positions, None),
    "wrong scale": (
        wrong_scale, on_blocks(z=lambda z: 1.01 * z, pattern=lambda pattern: 1.01 * pattern),
    ),
    "transposed W_O": (transposed_W_O, on_blocks(attention=_transposed)),
    "swapped heads": (swapped_heads, on_blocks(attention=_flipped_W_O)),
    "drop b_in": (keep, on_mlps(b_in=torch.zeros_like)),
    "wrong norm": (keep, None),
    "drop b_Q and b_K": (keep, None),
    "no score scale": (keep, None),
    "swapped queries and keys": (keep, None),
    "dropped norm bias": (keep, None),
}  # fmt: skip


def _weights(change) -> Callable:
    """Every attention's weights, as a view gives them, wrong in one way."""
    right = HookedView._attention
    return lambda self, layer: change(right(self, layer))


def _swap(attention):
    names = {"W_Q": "W_K", "W_K": "W_Q", "b_Q": "b_K", "b_K": "b_Q"}
    return replace(attention, **{name: getattr(attention, other) for name, other in names.items()})


def _no_bias(self, right, site, scale):
    return replace(right(self, site, scale), bias=None)


@contextlib.contextmanager
def mutated(name: str) -> Iterator[None]:
    """Every analysis, wrong in one way."""
    on_part, on_block = MUTATIONS[name]
    with contextlib.ExitStack() as stack:

        def patch(owner, attribute, make):
            right = getattr(owner, attribute)
            wrong = make(right)
            stack.enter_context(mock.patch.object(owner, attribute, wrong))

        if name == "wrong norm":  # whatever reads the stream reads it 1 % too large
            for method in ("forward", "back_unscaled", "weights_back"):
                patch(Read, method, lambda right: lambda self, x: _enlarged(self, right, x))
        elif name == "drop b_out":
            patch(HookedView, "_mlp", lambda right: lambda *a: _without_b_out(right(*a)))
        elif name == "dropped norm bias":
            patch(HookedView, "read", lambda right: lambda *a: _no_bias(a[0], right, *a[1:]))
        elif name == "drop b_Q and b_K":
            patch(HookedView, "_attention", lambda right: _weights(_zero("b_Q", "b_K")))
        elif name == "no score scale":
            patch(HookedView, "_attention", lambda right: _weights(lambda a: replace(a, scale=1.0)))
        elif name == "swapped queries and keys":
            patch(HookedView, "_attention", lambda right: _weights(_swap))
        for level in {type(one) for one in levels.LEVELS.values()}:
            if "parts" in vars(level):

                def parts(self, trace, *more, right=level.parts, **named):
                    return (on_part(part, trace) for part in right(self, trace, *more, **named))

                stack.enter_context(mock.patch.object(level, "parts", parts))
        if on_block is not None:
            patch(Trace, "_given", lambda right: lambda *a: on_block(right(*a)))
        if name == "wrong positions":
            patch(
                Trace, "embeds",
                lambda right: lambda self: {
                    kind: x * (0.9 if kind == "pos_embed" else 1) for kind, x in right(self).items()
                },
            )  # fmt: skip
        yield


def verdicts(model) -> dict[str, dict[str, bool]]:
    """For each mutation (and none), which certificates hold."""
    table = {"none": {c.identity: c.holds for c in lf.certify(model)}}
    for name in MUTATIONS:
        with mutated(name):
            table[name] = {c.identity: c.holds for c in lf.certify(model)}
    return table


def main() -> None:
    from support.models import freeze_all, make_gpt2

    live = lf.load(make_gpt2(), dtype=torch.float64, check=False)
    model = freeze_all(
        live
    )  # with its norm sites, so that norms have gains and biases to get wrong
    table = verdicts(model)
    lines = ["| certificate | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
    for identity in table["none"]:
        row = ["holds" if table[name][identity] else "**fails**" for name in table]
        lines.append(f"| {identity} | " + " | ".join(row) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
