"""What each domain's text costs after each domain that was trained, and what was forgotten."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.prompts import batches
from lnfree_interp.errors import DataError
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.running import run


@dataclass(frozen=True, eq=False)
class BankEvaluation:
    """Losses and accuracies on the text of each domain, after each domain that was trained.

    `NormBanks.evaluate` makes one. One of your own, such as that of a model whose norms were
    fine-tuned on one domain after the other, is read and drawn alike.

    Raises:
        DataError: if the tables have other shapes than there are names.
    """

    domains: tuple[str, ...]
    """The columns: whose text it is."""
    stages: tuple[str, ...]
    """The rows: which domain was trained last."""
    selection: str
    """How each sequence got its bank, `oracle`, `keys`, `last`, or a word of your own."""
    loss: Float[Tensor, "stage domain"]
    """Mean cross-entropy of the next token, in nats per token."""
    accuracy: Float[Tensor, "stage domain"]
    """The share of tokens that are the most likely one by the model, in 0..1."""
    before: Float[Tensor, " domain"] | None = None
    """The loss before the first domain was trained; None if it was not measured."""
    selected: Int[Tensor, "domain stage"] | None = None
    """How many sequences of each domain got each bank at the last stage; None without banks."""

    def __post_init__(self) -> None:
        shape = (len(self.stages), len(self.domains))
        for what in ("loss", "accuracy"):
            if tuple(getattr(self, what).shape) != shape or 0 in shape:
                raise DataError(
                    f"{what} is {list(getattr(self, what).shape)}, and there are {shape[0]} stages "
                    f"and {shape[1]} domains: give a table [stage, domain]"
                )

    @property
    def forgetting(self) -> float:
        """How much the loss has risen again, in nats per token: `forgetting(loss, losses=True)`."""
        return forgetting(self.loss, losses=True)

    @property
    def forgotten_accuracy(self) -> float:
        """How much of the accuracy was lost again: `forgetting(accuracy)`."""
        return forgetting(self.accuracy)

    @property
    def selection_accuracy(self) -> float:
        """The share of sequences that got the bank of their own domain.

        Raises:
            DataError: if there were no banks to choose from.
        """
        if self.selected is None:
            raise DataError("nothing was selected: only NormBanks.evaluate has a selection")
        own = [
            int(row[self.stages.index(domain)])
            for domain, row in zip(self.domains, self.selected, strict=True)
        ]
        return sum(own) / int(self.selected.sum())

    def table(self, of: str = "loss") -> pd.DataFrame:
        """The losses or accuracies with their names: a row for each stage.

        Args:
            of: `"loss"` or `"accuracy"`.

        Raises:
            DataError: for another word.
        """
        return pd.DataFrame(
            self.values(of).tolist(),
            index=pd.Index(self.stages, name="after"),
            columns=pd.Index(self.domains),
        )

    def values(self, of: str = "loss") -> Float[Tensor, "stage domain"]:
        """One of the two tables.

        Raises:
            DataError: for another word than `"loss"` and `"accuracy"`.
        """
        if of not in ("loss", "accuracy"):
            raise DataError(f"of={of!r}: give 'loss' or 'accuracy'")
        return self.loss if of == "loss" else self.accuracy

    def __repr__(self) -> str:
        losses = ", ".join(
            f"{name} {loss:.4f}"
            for name, loss in zip(self.domains, self.loss[-1].tolist(), strict=True)
        )
        chosen = "" if self.selected is None else f"; {self.selection_accuracy:.1%} selected right"
        return (
            f"BankEvaluation({self.selection}: {losses} nats; forgetting {self.forgetting:.4f}"
            f"{chosen})"
        )


def forgetting(
    values: Float[Tensor, "stage domain"] | Sequence[Sequence[float]], *, losses: bool = False
) -> float:
    """How far each domain has fallen behind its best, on average: mean_i(max_t A_ti - A_Ti).

    Args:
        values: [stage, domain], accuracies after each domain that was trained; the last row is that
            of the finished model.
        losses: Whether they are losses, of which the least is the best: the sign is turned.

    Returns:
        The mean over domains, in the unit of the values, 0 or more.

    Raises:
        DataError: if there is no value.

    Source:
        arXiv 2308.09610, after 1801.10112.

    Examples:
        >>> lf.forgetting([[0.5, 0.25], [0.25, 0.75]])
        0.125
        >>> lf.forgetting([[2.0, 3.5], [3.0, 1.0]], losses=True)
        0.5
    """
    A = torch.as_tensor(values).double()
    if A.ndim != 2 or A.numel() == 0:
        raise DataError(f"forgetting is of a table [stage, domain], not of {list(A.shape)}")
    A = -A if losses else A
    return (A.amax(0) - A[-1]).mean().item()


def evaluate_banks(
    models: Mapping[str, HookedTransformer],
    texts: Mapping[str, Int[Tensor, "_sequence _pos"]],
    likeness: Mapping[str, Float[Tensor, "_sequence _domain"]] | None,
    selection: str,
    batch: int,
) -> BankEvaluation:
    """Measure models of one domain each on the text of each.

    Args:
        models: The model below all banks, then those of the domains in the order of training.
        texts: By domain, a name of `models`.
        likeness: By domain, how much each sequence is like each domain of `models`, for `"keys"`.
        selection: As for `NormBanks.evaluate`.
        batch: How many sequences run at once.
    """
    _, *stages = models
    base, *every = models.values()
    tables = torch.zeros(2, len(stages), len(texts), dtype=torch.float64)
    selected, before = [], []
    for column, (domain, tokens) in enumerate(texts.items()):
        scores: dict[int, Tensor] = {}
        before.append(_scores(base, tokens, batch)[0].mean())
        chosen = own = torch.full((len(tokens),), stages.index(domain))
        for stage in range(len(stages)):
            chosen = own.clamp(max=stage) if selection == "oracle" else torch.full_like(own, stage)
            if likeness is not None:
                chosen = likeness[domain][:, : stage + 1].argmax(1).cpu()
            for bank in chosen.unique().tolist():
                if bank not in scores:
                    scores[bank] = _scores(every[bank], tokens, batch)
                tables[:, stage, column] += scores[bank][:, chosen == bank].sum(1) / len(tokens)
        selected.append(torch.bincount(chosen, minlength=len(stages)))
    loss, accuracy = tables
    return BankEvaluation(
        tuple(texts), tuple(stages), selection, loss, accuracy, torch.stack(before),
        torch.stack(selected),
    )  # fmt: skip


@torch.no_grad()
def _scores(
    model: HookedTransformer, tokens: Int[Tensor, "sequence pos"], batch: int
) -> Float[Tensor, "measure sequence"]:
    """Mean loss and accuracy of each sequence, in float64 on the CPU."""
    found = []
    for rows in batches(tokens, batch):
        logits = run(model, rows)
        loss = next_token_loss(logits, rows, reduction="none").double().view(len(rows), -1)
        right = (logits[:, :-1].argmax(-1) == rows[:, 1:]).double()
        found.append(torch.stack([loss.mean(1), right.mean(1)]).cpu())
    return torch.cat(found, 1)
