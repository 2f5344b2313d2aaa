"""The logit lens: what the unembedding reads from the stream at every layer.

With a live final norm, the lens at each layer rescales the stream by that layer's own scale, so the
steps from layer to layer are no attribution. Without one, each step is exactly what the block adds:
lens(l + 1) - lens(l) is block l's direct logit attribution.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import SupportsIndex

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.levels import level
from lnfree_interp.analysis.logit_targets import logits_of_targets, read_logits
from lnfree_interp.analysis.parts import project
from lnfree_interp.analysis.positions import Positions, read_number
from lnfree_interp.analysis.results import CertifiedResult, read_top
from lnfree_interp.analysis.stream import Place
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import measure_error


@dataclass(frozen=True, eq=False, repr=False)
class Lens(CertifiedResult):
    """The logit of the true next token, layer by layer; at the last position, which has no next
    token, the logit of the token that the model predicts.

    Attributes:
        values: [layer + 1, prompt, pos], in logits; the first row is before block 0, the last
            the logit.
        increments: [layer, prompt, pos], what each block adds, in logits.
        targets: [prompt, pos], the id of the token whose logit is read there.
        predicted: [layer + 1, prompt, pos], the id of the token that the lens predicts there.
        prompts: The tokens of each prompt, as strings.
        names: Each token of `predicted` and `targets`, as a string.
        certificate: The steps of the lens against direct attribution by layer. Where a live norm
            is held, these are steps with its final scale at every layer, and the gap is how far
            the steps with each layer's own scale are from the attribution.
    """

    values: Float[Tensor, "place prompt pos"]
    targets: Int[Tensor, "prompt pos"]
    predicted: Int[Tensor, "place prompt pos"]
    prompts: tuple[tuple[str, ...], ...]
    names: Mapping[int, str]
    certificate: Certificate

    @property
    def increments(self) -> Float[Tensor, "layer prompt pos"]:
        """[layer, prompt, pos], what each block adds, in logits."""
        return self.values.diff(dim=0)

    def select(self, prompt: SupportsIndex) -> "Lens":
        """The lens of one prompt, as a batch of one.

        Raises:
            DataError: if there is no such prompt.
        """
        row = read_number(prompt, len(self.prompts), "prompt")
        one = slice(row, row + 1)
        return replace(
            self, values=self.values[:, one], targets=self.targets[one],
            predicted=self.predicted[:, one], prompts=self.prompts[one],
        )  # fmt: skip

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, position and place: `prompt`, `pos`, `token`, `target`, `place`,
        `value` in logits, `predicted`; `held` where something was held."""
        rows = [
            {
                "prompt": i, "pos": pos, "token": token,
                "target": self.names[int(self.targets[i, pos])], "place": place,
                "value": self.values[place, i, pos].item(),
                "predicted": self.names[int(self.predicted[place, i, pos])],
            }
            for i, tokens in enumerate(self.prompts)
            for pos, token in enumerate(tokens)
            for place in range(len(self.values))
        ]  # fmt: skip
        return self._noted(pd.DataFrame(rows))

    def top(self, k: SupportsIndex = 10) -> pd.DataFrame:
        """The k steps of largest absolute value: `prompt`, `pos`, `layer`, `value`; `held` where
        something was held.

        Raises:
            DataError: if k is less than one.
        """
        flat = self.increments.abs().flatten()
        places = flat.topk(read_top(k, flat.numel())).indices
        layer, prompt, pos = torch.unravel_index(places, self.increments.shape)
        frame = pd.DataFrame(
            {
                "prompt": prompt.tolist(), "pos": pos.tolist(), "layer": layer.tolist(),
                "value": self.increments.flatten()[places].tolist(),
            }
        )  # fmt: skip
        return self._noted(frame)

    def __repr__(self) -> str:
        return f"Lens(values [{', '.join(map(str, self.values.shape))}], {self.certificate})"


@analysis
def logit_lens(trace: Trace) -> Lens:
    """The stream at every layer, read through the final norm and the unembedding.

    It gives the logit of the true next token; at the last position, the logit of the token that the
    model predicts.

    Args:
        trace: A trace; or a model and a prompt, or tokens [sequence, pos], as two arguments. With
            a live final norm the trace must hold; the lens then divides each layer by that layer's
            own scale, as logit lenses do.

    Returns:
        Values [layer + 1, prompt, pos], in logits; the first row is before block 0.

    Raises:
        InexactError: if the final norm is live or the logits are capped, and the trace does not
            hold.
        DataError: if prompts differ in length, or the model cannot read them.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru. Ours: that its
        steps are attributions, which needs a model without a live final norm.

    Examples:
        >>> lens = lf.logit_lens(free, tokens).verify()
        >>> lens.values.shape
        torch.Size([5, 4, 64])
        >>> lens.increments.shape
        torch.Size([4, 4, 64])
    """
    view, by_layer = trace.view, level("layer")
    if len(set(trace.lengths)) > 1:
        raise DataError(
            "the prompts differ in length, and a lens is for prompts of one length: ask about one "
            "prompt at a time"
        )
    places = [Place(layer) for layer in range(view.n_layers + 1)]
    trace.require_text().require_affine(["ln_final"], logits=True)
    trace.need(*(place.hook for place in places), *by_layer.needs(view, view.last))
    streams = [trace.stream(place) for place in places]
    at_end = trace.positions(-1)
    last = view.logits(at_end.of(streams[-1]), first=trace.first(at_end))[0].argmax(-1)
    targets = torch.cat([trace.tokens[:, 1:], last], dim=1)
    if targets.max() >= view.cfg.d_vocab_out:
        raise DataError(
            f"the model has logits for tokens 0 to {view.cfg.d_vocab_out - 1} only: leave out "
            "prompts with other tokens"
        )
    found = [logits_of_targets(view, stream, targets) for stream in streams]
    lens, top = (torch.stack(each) for each in zip(*found, strict=True))
    everywhere = Positions(slice(None))
    reading = read_logits(trace, everywhere, targets, None, (), ("prompt", "target"))
    values, components = project(by_layer.parts(trace, view.last, everywhere), reading.direction)
    rows = [i for i, component in enumerate(components) if component.kind == "layer"]
    added, steps = values[rows], lens.diff(dim=0)
    largest = max(values.abs().max().item(), lens.abs().max().item())
    gap, identity = None, "lens(l + 1) - lens(l) = attribution of block l"
    if reading.held:
        gap = measure_error(steps, added)
        held = [torch.linalg.vecdot(stream, reading.direction) for stream in streams]
        steps = torch.stack(held).diff(dim=0)
    error = measure_error(steps, added, largest)
    ids = torch.cat([top.flatten(), targets.flatten()]).unique().tolist()
    return Lens(
        lens, targets, top, trace.prompts, dict(zip(ids, view.strings(ids), strict=True)),
        Certificate(identity, error, reading.held, gap),
    )  # fmt: skip
