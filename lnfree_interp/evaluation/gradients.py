"""Gradient balance: how large the gradients of weights are in each layer."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.prompts import batches, read_sequences
from lnfree_interp.errors import DataError
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.running import require_hooked, run
from lnfree_interp.removal.probes import block_weights
from lnfree_interp.removal.run import Run, StepRecord


@dataclass(frozen=True, eq=False)
class GradientBalance:
    """The mean absolute entry of each weight's gradient, by kind of weight and layer."""

    by_kind: Mapping[str, Float[Tensor, " layer"]]
    """By kind, such as `mlp.W_out`: the mean absolute entry of the gradient in each layer, in nats
    per unit of weight."""
    about: str
    """What it was measured on, in words."""

    @classmethod
    def of_run(cls, run: Run | Sequence[StepRecord], from_step: int = 0) -> "GradientBalance":
        """The mean over the steps of a run that measured it, every `log_every` steps.

        Args:
            run: A run, or the records of its steps.
            from_step: The first step that counts, such as the end of the warm-up.

        Raises:
            DataError: if no step measured it.
        """
        history = run.history if isinstance(run, Run) else run
        found = [
            record.probes["gradients"] for record in history
            if record.step >= from_step and record.probes.get("gradients")
        ]  # fmt: skip
        if not found:
            raise DataError(
                f"no step from {from_step} on measured gradients: give a run of this version with "
                "log_every above 0, and an earlier from_step"
            )
        means = {
            kind: torch.tensor([one[kind] for one in found], dtype=torch.float64).mean(0)
            for kind in found[0]
        }
        return cls(means, f"the run's own loss, mean of {len(found)} steps")

    @property
    def first_over_last(self) -> dict[str, float]:
        """By kind, the first layer's gradient over the last layer's; 1 is balanced."""
        return {kind: (layers[0] / layers[-1]).item() for kind, layers in self.by_kind.items()}

    def to_frame(self) -> pd.DataFrame:
        """A row for each layer and a column for each kind of weight."""
        columns = {kind: layers.tolist() for kind, layers in self.by_kind.items()}
        return pd.DataFrame(columns).rename_axis("layer")

    def __repr__(self) -> str:
        ratios = ", ".join(f"{kind} {x:.3g}" for kind, x in self.first_over_last.items())
        return f"GradientBalance({self.about}; first layer over last: {ratios})"


def gradient_balance(
    model: HookedTransformer, text: Int[Tensor, "sequence pos"], *, batch: int = 4
) -> GradientBalance:
    """How large the gradients of the loss are in each layer, by kind of weight.

    A run measures it of its own loss, distillation and further terms included, every `log_every`
    steps: `lf.GradientBalance.of_run(run)`. This is cross-entropy alone.

    Args:
        model: A `HookedTransformer` in any form. Neither it nor its gradients change.
        text: Token ids [sequence, pos]; the loss is the mean over all of it, as in one step of
            training.
        batch: How many sequences run at once; the result depends on it by rounding only.

    Returns:
        A `GradientBalance`; `lf.plots.gradient_balance(...)` draws one or several.

    Raises:
        DataError: if the model cannot read the text.

    Source:
        arXiv 2110.09456: gradients of early layers are larger than those of late ones in Pre-LN
        models, and the opposite in Post-LN models.

    Examples:
        >>> balance = lf.gradient_balance(model, tokens)
        >>> balance.to_frame().shape
        (4, 6)
        >>> sorted(balance.first_over_last)[:2]
        ['attn.W_K', 'attn.W_O']
    """
    require_hooked(model)
    tokens = read_sequences(model, text, packed=True)
    own, weights = model, block_weights(model)
    if not all(W.requires_grad for layers in weights.values() for W in layers):
        # The same weights, which require gradients here whatever the model's parameters do.
        shared: dict[int, Any] = {id(W): nn.Parameter(W.detach()) for W in model.parameters()}
        own = copy.deepcopy(model, shared | {id(model.tokenizer): model.tokenizer})
        weights = block_weights(own)
    every = [W for layers in weights.values() for W in layers]
    sums = [torch.zeros_like(W) for W in every]
    with torch.enable_grad():
        for chunk in batches(tokens, batch):
            loss = next_token_loss(run(own, chunk), chunk) * (len(chunk) / len(tokens))
            for total, gradient in zip(sums, torch.autograd.grad(loss, every), strict=True):
                total += gradient
    sizes = iter([gradient.abs().mean().double().cpu() for gradient in sums])
    found = {kind: torch.stack([next(sizes) for _ in layers]) for kind, layers in weights.items()}
    return GradientBalance(found, f"cross-entropy of {tokens[:, 1:].numel():,} tokens")
