"""What an intervention did to a target: predicted and measured, side by side."""

from dataclasses import dataclass
from typing import SupportsIndex

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.results import CertifiedResult, largest_rows


@dataclass(frozen=True, eq=False, repr=False)
class Effects(CertifiedResult):
    """What a target loses by an intervention: predicted, direct and total effect.

    Attributes:
        components: The labels of what was changed: one component in each row, and all of them in
            the last row if there are several.
        predicted: [change, prompt], what direct attribution says, in the target's unit: the share
            of the component minus the share of what took its place.
        direct: [change, prompt], measured with the change made only in the stream that the target
            reads; along a path, with the patterns of its heads given.
        total_effect: [change, prompt], measured with the change made in the model; everything up to
            the place where the target reads is computed anew, and nothing is held. What belongs to
            the target is as it was: the other side of a score, and the slope or gate of a neuron's
            `post`.
        before: [prompt], the target without the intervention.
        of: What the target is, for each prompt.
        unit: The unit of all numbers.
        with_: What took the components' place.
        certificate: The predicted against the direct effect; they are equal on an LN-free model.
        prompts: The tokens of each prompt, as strings.
    """

    components: tuple[str, ...]
    predicted: Float[Tensor, "change prompt"]
    direct: Float[Tensor, "change prompt"]
    total_effect: Float[Tensor, "change prompt"]
    before: Float[Tensor, " prompt"]
    of: tuple[str, ...]
    unit: str
    with_: str
    certificate: Certificate
    prompts: tuple[tuple[str, ...], ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per change and prompt: `component`, `prompt`; `predicted`, `direct` and `total`,
        which say what the target loses, in its unit; `before`; and `held` where something was
        held for the prediction."""
        rows = [
            {
                "component": label, "prompt": i, "predicted": self.predicted[row, i].item(),
                "direct": self.direct[row, i].item(), "total": self.total_effect[row, i].item(),
                "before": self.before[i].item(),
            }
            for row, label in enumerate(self.components)
            for i in range(len(self.before))
        ]  # fmt: skip
        return self._noted(pd.DataFrame(rows))

    def top(self, k: SupportsIndex = 10) -> pd.DataFrame:
        """The k rows of largest total effect.

        Raises:
            DataError: if k is less than one.
        """
        return largest_rows(self.to_frame(), "total", k)

    def __repr__(self) -> str:
        predicted, total = self.predicted[-1].mean().item(), self.total_effect[-1].mean().item()
        what = ", ".join(self.components[:3]) + (", ..." if len(self.components) > 3 else "")
        return self._line(
            f"{what} replaced by {self.with_}: {predicted:+.3f} predicted, {total:+.3f} in all"
        )
