"""Interventions: components are taken away or replaced by label, with nothing held or given.

A decomposition predicts what a target loses without a part. An intervention asks the model: it
changes the component and computes everything behind it anew, including norms, patterns and gates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.changes import (
    WITHIN,
    Change,
    find_part,
    level_of,
    merged,
    put,
    subtract,
)
from lnfree_interp.analysis.components import Component, as_labels
from lnfree_interp.analysis.effects import Effects
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.score_targets import require_head
from lnfree_interp.analysis.stream import Place, Stream
from lnfree_interp.analysis.targets import Target
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.errors import DataError, InexactError
from lnfree_interp.models.running import Edit
from lnfree_interp.numerics import measure_error, own_precision

With = Literal["zero", "mean", "unseen"]


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """Components of a trace, replaced by zero, by their mean, or by those of another trace; or
    tokens that heads do not see.

    Attributes:
        trace: The forward pass without the intervention.
        labels: The labels of the components to replace.
        with_: What takes their place.
        by: The level whose parts they are; None for the level that each label needs.
    """

    trace: Trace
    labels: tuple[str, ...]
    with_: With | Trace = "zero"
    by: str | Level | None = None

    def __post_init__(self) -> None:
        self.trace.require_text()
        if not self.labels:
            raise DataError("no component was named: give at least one component to replace")
        if twice := [label for label in self.labels if self.labels.count(label) > 1]:
            raise DataError(f"{twice[0]} was given more than once: give each component once")
        if isinstance(self.with_, Trace):
            if self.with_.lengths != self.trace.lengths:
                raise DataError(
                    f"the other trace has prompts of {self.with_.lengths} tokens, this one of "
                    f"{self.trace.lengths}: positions do not match, so give prompts of the same "
                    "lengths"
                )
        elif self.with_ not in get_args(With):
            raise DataError(
                f"with_={self.with_!r} is not allowed: give 'zero', 'mean', 'unseen' or another "
                "trace"
            )
        _ = self._changes  # so that errors are raised now, not when it is run

    @cached_property
    def _changes(self) -> list[Change]:
        return [self._change(label) for label in self.labels]

    @property
    def gone(self) -> Stream:
        """[prompt, pos, d_model], what the stream loses directly, as the blocks see it."""
        return self._gone(self._changes)

    def _gone(self, changes: Sequence[Change]) -> Stream:
        if self.with_ != "unseen" or len(changes) == 1:
            return sum((change.gone for change in changes[1:]), changes[0].gone)
        # A head weighs what it still sees once, however many tokens it does not see.
        layers: dict[int, list[Change]] = {}
        for change in changes:
            assert change.layer is not None
            layers.setdefault(change.layer, []).append(change)
        lost = [
            self._lost(layer, get_act_name("attn_out", layer), merged(some))
            for layer, some in layers.items()
        ]
        return sum(lost[1:], lost[0])

    def edits(self) -> dict[str, Edit]:
        """What the intervention does to a run, by hook name."""
        return merged(self._changes)

    def hooks(self) -> list[tuple[str, Any]]:
        """The edits as hooks of TransformerLens: `model.run_with_hooks(tokens, fwd_hooks=...)`."""
        return [(name, lambda x, hook, edit=edit: edit(x)) for name, edit in self.edits().items()]

    @own_precision
    def run(self, place: str | Place | None = None) -> Stream:
        """The stream at a place, by default the last, after the change; all behind it runs anew."""
        return self._run(self._changes, self.trace.view.place(place))

    def _run(self, changes: Sequence[Change], place: Place) -> Stream:
        stop = min(place.layer + 1, self.trace.view.n_layers)
        tokens, edits = self.trace.tokens, merged(changes)
        return self.trace.view.run(tokens, [place.hook], stop=stop, edits=edits)[1][place.hook]

    @own_precision
    def compare(self, target: Target) -> Effects:
        """What a target loses, predicted and measured, side by side.

        Args:
            target: The target to compare, such as `lf.LogitDifference(...)`.

        Returns:
            `Effects` with a row for each component alone, and a row for all of them if there are
            several.

        Raises:
            DataError: for several answers at once, or a component that is written after the target
                has read the stream.
            InexactError: if the target reads through a live norm and the trace does not hold; or if
                a head does not see a token, and its weights are divided by their sum.
        """
        place, names = target.needs(self.trace)
        for label, change in zip(self.labels, self._changes, strict=True):
            if change.written.order > place.order:
                raise DataError(
                    f"{label} is written after the target reads the stream (at {place.hook}), and "
                    "has no effect on it: give components from before"
                )
        self.trace.need(*names, place.hook)
        reading = target.read(self.trace)
        held = (*reading.held, *self._held())
        if reading.total.shape[1] != 1:
            raise DataError("several answers or positions were given: compare one at a time")
        stream, at = reading.at.of(self.trace.stream(place)), reading.at
        groups = [[change] for change in self._changes]
        groups += [self._changes] if len(groups) > 1 else []
        rows: list[list[Tensor]] = [[], [], []]
        for changes in groups:
            claimed = at.of(sum((change.predicted for change in changes[1:]), changes[0].predicted))
            gone = at.of(self._gone(changes))
            rows[0].append(torch.linalg.vecdot(claimed, reading.direction).sum(1))
            rows[1].append((reading.total - reading.again(stream - gone, slice(None)))[:, 0])
            after = reading.again(at.of(self._run(changes, place)), slice(None))
            rows[2].append((reading.total - after)[:, 0])
        predicted, direct, total = map(torch.stack, rows)
        size = max(predicted.abs().max().item(), reading.total.abs().max().item(), reading.scale)
        certificate = Certificate(
            "predicted effect = effect on the stream that is read",
            measure_error(predicted, direct, size), held,
            measure_error(predicted, direct) if held else None,
        )  # fmt: skip
        return Effects(
            (*self.labels, "all of them")[: len(groups)], predicted, direct, total,
            reading.total[:, 0], reading.of, reading.unit, self._by_what, certificate,
            self.trace.prompts,
        )  # fmt: skip

    def _held(self) -> tuple[str, ...]:
        """Divisors of attention weights that predictions hold.

        Raises:
            InexactError: if there are some, and the trace does not hold.
        """
        held = tuple(dict.fromkeys(name for one in self._changes for name in one.held))
        if held and not self.trace.hold:
            raise InexactError(
                f"{held[0]} depends on the tokens that a head sees, so that without one of them "
                "all its other weights change: hold it with lf.trace(model, prompt, hold=True), "
                "and the result says how far the prediction misses; or take the weights as given, "
                "with_='zero'. Linear attention that divides by the count has none"
            )
        return held

    @property
    def _by_what(self) -> str:
        return "another trace" if isinstance(self.with_, Trace) else self.with_

    def __repr__(self) -> str:
        return f"Intervention({', '.join(self.labels)} replaced by {self._by_what})"

    def _change(self, label: str) -> Change:
        component = Component.parse(label) if self.by is None else None
        if component is not None and component.through:
            if self.with_ == "unseen":
                raise DataError(
                    f"{label} is a path, and with_='unseen' is about what a head sees: give labels "
                    "such as L2H5@3, or 'zero', 'mean' or another trace"
                )
            return self._path(component)
        chosen = level(self.by or level_of(label, component))
        part, row, pos = find_part(chosen.parts(self.trace, self.trace.view.last), label)
        component = part.components[row]
        if self.with_ == "unseen":
            return self._unseen(component, label)
        if pos is not None and pos >= self.trace.n_pos:
            raise DataError(
                f"{label}: there is no position {pos} among {self.trace.n_pos} tokens: they count "
                "from 0"
            )
        predicted = self._replaced(part.vectors([row])[:, :, 0], chosen, label)
        if pos is not None:
            predicted = predicted * (torch.arange(self.trace.n_pos) == pos).to(predicted)[:, None]
        layer, index = component.layer, component.index
        if layer is None or component.kind not in WITHIN:
            embeds = component.kind in ("embed", "pos_embed")
            hook = f"hook_{component.kind}" if embeds else part.written.hook
            return Change({hook: lambda x: x - predicted}, predicted, predicted, part.written)
        within, written = (get_act_name(name, layer) for name in WITHIN[component.kind])
        if index is not None and component.pos is not None:
            edits = {within: subtract(index, self._moved_from(component))}
        else:
            x = self.trace[within] if index is None else self.trace[within][:, :, index]
            at = slice(None) if pos is None else slice(pos, pos + 1)
            edits = {within: put(index, at, self._instead(x, within, index))}
        return Change(edits, self._lost(layer, written, edits), predicted, part.written)

    def _lost(self, layer: int, written: str, edits: Mapping[str, Edit]) -> Stream:
        """What a block writes less by edits inside it."""
        stream = self.trace.stream(Place(layer))
        _, found = self.trace.view.run(
            stream, [written], start=layer, stop=layer + 1, edits=edits
        )  # fmt: skip
        return self.trace[written] - found[written]

    def _replaced(self, vector: Stream, chosen: Level, label: str) -> Stream:
        """A part of the stream minus what takes its place."""
        if isinstance(self.with_, Trace):
            part, row, _ = find_part(chosen.parts(self.with_, self.with_.view.last), label)
            return vector - part.vectors([row])[:, :, 0]
        return vector - self._mean(vector) if self.with_ == "mean" else vector

    def _instead(self, x: Tensor, name: str, index: int | None) -> Tensor:
        """What takes an activation's place."""
        if isinstance(self.with_, Trace):
            other = self.with_[name]
            return other if index is None else other[:, :, index]
        return self._mean(x).expand_as(x) if self.with_ == "mean" else torch.zeros_like(x)

    def _mean(self, x: Tensor) -> Tensor:
        """The mean of an activation over all positions that are text."""
        lengths = torch.tensor(self.trace.lengths, device=x.device)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return x[real].mean(0)

    def _moved_from(self, head: Component) -> Float[Tensor, "batch pos d_head"]:
        """What a head gets from one token without its biases, minus what takes its place."""
        layer, index, pos = head.layer or 0, head.index or 0, head.pos

        def moved(trace: Trace) -> Tensor:
            pattern, v = trace.act("pattern", layer), trace.act("v", layer)
            value = v[:, pos, index * v.shape[2] // pattern.shape[1]]
            value = value - trace.view.value_bias(layer)[index]
            return pattern[:, index, :, pos, None] * value[:, None]

        here = moved(self.trace)
        if isinstance(self.with_, Trace):
            return here - moved(self.with_)
        return here - self._mean(here) if self.with_ == "mean" else here

    def _unseen(self, component: Component, label: str) -> Change:
        """A head that does not see a token: its key is taken away, and its pattern is anew."""
        layer, index, pos = component.layer, component.index, component.pos
        if component.kind != "head" or layer is None or index is None or pos is None:
            raise DataError(
                f"{label} is no token that a head sees, as with_='unseen' needs: give labels such "
                "as L2H5@3, or 'zero', 'mean' or another trace"
            )
        trace, divisor = self.trace, self.trace.view.weighing(layer)
        scores, written = (get_act_name(name, layer) for name in ("attn_scores", "attn_out"))
        none = -torch.inf if divisor == "softmax" else 0.0

        def hide(x: Float[Tensor, "batch head query key"]) -> Tensor:
            x = x.clone()
            x[:, index, :, pos] = none
            return x

        pattern, v = trace.act("pattern", layer), trace.act("v", layer)
        value = v[:, pos, index * v.shape[2] // pattern.shape[1]]
        read = pattern[:, index, :, pos, None] * value[:, None]
        predicted = trace.view.attention(layer).write(read[:, :, None], [index])[:, :, 0]
        held = () if divisor == "count" else (f"the sum of weights of L{layer}H{index}",)
        edits: Mapping[str, Edit] = {scores: hide}
        gone = self._lost(layer, written, edits)
        return Change(edits, gone, predicted, trace.view.attn_written(layer), held, layer)

    def _path(self, path: Component) -> Change:
        """A change along one path: each head on the path reads it, and nothing else does."""
        trace, view = self.trace, self.trace.view
        start = self._change(replace(path, through=()).label)
        # Nothing held; patterns given; patterns given and by the weights alone.
        free, given, predicted = start.gone, start.gone, start.predicted
        edits, before = start.edits, -1 if path.layer is None else path.layer
        for head in path.through:
            layer, index = head.layer, head.index
            if head.kind != "head" or layer is None or index is None:
                raise DataError(
                    f"{path.label}: a path passes through heads, and {head.label} is no head: name "
                    "heads behind its start, such as L0H1 > L2H5"
                )
            require_head(view, layer, index)
            if layer <= before:
                raise DataError(
                    f"{path.label}: {head.label} does not come after what it reads: give heads of "
                    "later and later layers"
                )
            before, block = layer, trace.block(layer)
            hook, pattern = (get_act_name(name, layer) for name in ("z", "pattern"))
            changed = []
            for gone, held in (
                (free, {}),
                (given, {pattern: lambda x, block=block: block.pattern}),
            ):
                stream = trace.stream(Place(layer)) - gone
                _, found = view.run(stream, [hook], start=layer, stop=layer + 1, edits=held)
                moved = (trace[hook] - found[hook])[:, :, index]
                edit = {hook: subtract(index, moved)}
                changed.append((edit, self._lost(layer, get_act_name("attn_out", layer), edit)))
            (edits, free), (_, given) = changed
            moved = block.pattern[:, index] @ (
                block.before.forward(predicted) @ block.attention.W_V[index]
            )
            predicted = block.attention.write(moved[:, :, None], [index])[:, :, 0]
        return Change(edits, given, predicted, view.attn_written(before))


@analysis
def ablate(
    trace: Trace,
    components: str | Component | Sequence[str | Component],
    with_: Literal["zero", "mean", "unseen"] | Trace = "zero",
    *,
    by: str | Level | None = None,
) -> Intervention:
    """Replace components by label, and compare what that does with what is predicted.

    Nothing is held or given: norms, patterns and gates behind the change are computed anew. Of
    several at once each has its replacement, whatever the others change before it; what a head
    reads from one token, or along a path, is taken away as it was without the others.

    Args:
        trace: A trace; or a model and a prompt, as two arguments.
        components: Labels: a head `"L23H3"`, what it reads from one token `"L23H3@4"`, a neuron
            `"L2N310"`, `"5_mlp_out"`, `"5_attn_out"`, `"embed"`, `"pos_embed"`; or a path
            `"L0H1 > L2H5"`, so that the change is read along this path only.
        with_: `"zero"`; `"mean"`, over the positions and prompts of this trace; or another trace of
            prompts of the same length, whose activations take their place. `"unseen"`, for labels
            such as `"L23H3@4"`: the head does not see that token, and weighs the others anew. What
            it loses is what it read of the token only in linear attention that divides by the
            count; elsewhere `compare` needs a trace that holds, and measures what that misses.
        by: A level of your own whose parts the labels name; they are taken out of the stream where
            they are first written. Default: the built-in level that each label needs.

    Returns:
        An `Intervention`: `.compare(target)` gives predicted and measured effects side by side,
        `.run()` gives the patched stream, `.hooks()` gives the hooks for TransformerLens.

    Raises:
        DataError: for a component that the model does not have or that cannot be replaced, or
            another trace that does not fit.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Ablation and patching by component: arXiv 2211.00593; along paths: arXiv 2304.05969; tokens
        that are not seen: arXiv 2304.14767, where it is called attention knockout. The
        comparison with what a decomposition predicts is ours.

    Examples:
        >>> trace = lf.trace(free, "for i in")
        >>> effects = lf.ablate(trace, ["L0H3", "2_mlp_out"]).compare(lf.Logit(" range"))
        >>> list(effects.verify().to_frame().columns)
        ['component', 'prompt', 'predicted', 'direct', 'total', 'before']
    """
    return Intervention(trace, tuple(as_labels(components)), with_, by)
