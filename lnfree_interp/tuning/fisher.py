"""Fisher information: how much each parameter matters for what a model says of a text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.prompts import batches, read_sequences
from lnfree_interp.analysis.results import read_top
from lnfree_interp.errors import DataError, RecipeError
from lnfree_interp.models.running import require_hooked, run
from lnfree_interp.models.site_names import stock_name
from lnfree_interp.models.sites import with_norm_sites
from lnfree_interp.models.weight_components import WeightComponent, list_weight_components
from lnfree_interp.numerics import wide
from lnfree_interp.tuning.parameter_mask import ParameterMask, Trainable
from lnfree_interp.tuning.selection import chosen_by

Kind = Literal["empirical", "model"]


@dataclass(frozen=True, eq=False)
class FisherInformation:
    """The diagonal of a Fisher information matrix, by parameter."""

    values: Mapping[str, Tensor]
    """By name in a stock model, in each parameter's shape: squared nats per squared unit of the
    parameter, for each predicted token."""
    mask: ParameterMask
    """What was measured; outside of it the values are 0."""
    kind: str
    """Whose next tokens: the text's (`"empirical"`) or the model's own (`"model"`)."""
    predictions: int
    """How many next tokens of the text were predicted."""
    components: tuple[WeightComponent, ...]
    """The model's components."""

    def to_frame(self) -> pd.DataFrame:
        """A row for each component of which something was measured: its entries, and their mean and
        total information."""
        rows = []
        for one in self.components:
            parts = [(name, row) for name, row in one.parts if name in self.values]
            within = [self.mask.chosen[name] for name, _ in parts]
            n = sum(
                int((mask if row is None else mask[row]).sum())
                for mask, (_, row) in zip(within, parts, strict=True)
            )
            total = sum(
                (self.values[name] if row is None else self.values[name][row]).sum().item()
                for name, row in parts
            )
            if n:
                rows.append((one.name, one.kind, one.layer, n, total / n, total))
        frame = pd.DataFrame(
            rows, columns=["component", "kind", "layer", "parameters", "mean", "total"]
        )
        return frame.astype({"layer": "Int64"})

    def top(self, k: int = 10, by: Literal["mean", "total"] = "mean") -> pd.DataFrame:
        """The components of most information, as a table.

        Raises:
            DataError: if k is less than one.
        """
        frame = self.to_frame().sort_values(by, ascending=False, kind="stable")
        return frame.head(read_top(k, len(frame))).reset_index(drop=True)

    def __repr__(self) -> str:
        top = self.top(3)
        pairs = zip(top["component"], top["mean"], strict=True)
        most = ", ".join(f"{name} {mean:.3g}" for name, mean in pairs)
        return (
            f"FisherInformation({self.kind}, {self.mask}, {self.predictions:,} next tokens; mean "
            f"of a component's entries, most: {most})"
        )


def fisher_information(
    model: HookedTransformer,
    text: Int[Tensor, "sequence pos"],
    *,
    kind: str = "empirical",
    trainable: Trainable = "all",
    draws: int | str = 1,
    batch: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> FisherInformation:
    """The diagonal Fisher information of a model's parameters on a text.

    For a sequence x with next tokens y, F = (d log p(y | x) / d theta)^2, summed over sequences and
    divided by the number of next tokens. With the model's own next tokens, drawn at each position
    behind the text as it stands, that is the information in its predictions, since the gradients of
    different positions are uncorrelated; with the text's it is the "empirical" one, which is also
    large where the model is wrong.

    Args:
        model: With live norms, or with norm sites. It does not change.
        text: Token ids [sequence, pos], all of it real text: no padding.
        kind: `"empirical"`: the text's next tokens; `"model"`: the model's own.
        trainable: Which parameters, in the words of `lf.select_parameters`, or a mask. Fewer need
            less memory, and those in early blocks most time.
        draws: For `"model"`: how often next tokens are drawn; or `"all"`: every token of the
            vocabulary by its probability, which is exact, and takes as many backward passes for
            each position.
        batch: Sequences at once (with `"all"`: next tokens), each of which needs the memory of a
            gradient. The result depends on it by rounding only.
        seed: The seed of the draws.
        progress: Whether to show a progress bar.

    Returns:
        A `FisherInformation`: `.top()` ranks components, `lf.fisher_subset` makes a mask of it.

    Raises:
        DataError: if the model cannot read the text.
        RecipeError: if `trainable` names what the model does not have.
        UnsupportedModelError: for a folded model, whose parameters are not those of a run.

    Source:
        arXiv 2403.20284 (the empirical one, of norms); arXiv 1905.12558 on what the two are.

    Examples:
        >>> fisher = lf.fisher_information(model, tokens, trainable="norms", progress=False)
        >>> fisher.top(3).columns.tolist()
        ['component', 'kind', 'layer', 'parameters', 'mean', 'total']
        >>> lf.fisher_subset(fisher, 0.25).count / fisher.mask.count
        0.25
    """
    require_hooked(model)
    if kind not in get_args(Kind):
        raise DataError(f"kind={kind!r}: give one of {list(get_args(Kind))}")
    if draws != "all" and (isinstance(draws, str) or draws < 1):
        raise DataError(f"draws={draws!r}: give 1 or more, or 'all'")
    tokens = read_sequences(model, text, packed=True)
    n_batches = len(batches(tokens, batch))
    sited = with_norm_sites(model, copy_weights=False)
    mask = chosen_by(sited, trainable, seed)
    names = {
        name: W.detach() for name, W in sited.named_parameters() if stock_name(name) in mask.chosen
    }
    sums = {name: torch.zeros_like(W, dtype=wide(W).dtype) for name, W in names.items()}
    predictions = tokens[:, 1:].numel()
    of = _Gradients(sited, names)
    found = _squares(of, tokens, kind, draws, batch, seed)
    steps = len(tokens) if draws == "all" and kind == "model" else n_batches
    bar = tqdm(found, total=steps, desc="Fisher information", unit="step", disable=not progress)
    for squares in bar:
        for name, square in squares.items():
            sums[name] += square
    values = {
        stock_name(name): torch.where(mask.chosen[stock_name(name)].to(W.device), W, 0)
        / predictions
        for name, W in sums.items()
    }
    return FisherInformation(values, mask, kind, predictions, list_weight_components(sited))


def fisher_subset(
    fisher: FisherInformation, share: float, *, among: ParameterMask | None = None
) -> ParameterMask:
    """The parameters of most Fisher information, entry by entry: for `Recipe.trainable`.

    Args:
        fisher: From `fisher_information`.
        share: The share of the entries that is kept, in 0..1 (0 excluded).
        among: The entries to choose among. Default: all that were measured.

    Returns:
        The mask; of several entries at the limit some are chosen.

    Raises:
        RecipeError: if the share is not in 0..1, or `among` has entries that were not measured.

    Source:
        arXiv 2403.20284.

    Examples:
        >>> fisher = lf.fisher_information(model, tokens, trainable="norms", progress=False)
        >>> from dataclasses import replace
        >>> recipe = lf.recipes.finetuning(steps=2, batch=2)
        >>> recipe = replace(recipe, trainable=lf.fisher_subset(fisher, 0.2))
        >>> run = lf.finetune(model, recipe, tokens, progress=False)
    """
    if not 0 < share <= 1:
        raise RecipeError(f"share must lie in 0..1 (0 excluded), not {share}")
    among = fisher.mask if among is None else among
    if (among | fisher.mask) != fisher.mask:
        raise RecipeError(
            f"of {among}, some were not measured: the Fisher information is of {fisher.mask}"
        )
    flat = [fisher.values[name].cpu()[mask].double() for name, mask in among.chosen.items()]
    if not flat:
        return among
    return among.keep(torch.cat(flat).topk(max(1, round(share * among.count))).indices)


class _Gradients:
    """Gradients of log-likelihoods, by `torch.func`."""

    def __init__(self, model: HookedTransformer, weights: dict[str, Tensor]):
        self.module = _Run(model)
        self.weights = {f"model.{name}": W for name, W in weights.items()}

    def log_probs(
        self, weights: dict[str, Tensor], row: Int[Tensor, " pos"]
    ) -> Float[Tensor, "target d_vocab"]:
        logits = functional_call(self.module, weights, (row[None],))[0, :-1]
        return wide(logits).log_softmax(-1)

    def squares(self, rows: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The squared gradient of each row's log-likelihood of its targets, summed over rows."""

        def log_likelihood(weights: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
            return self.log_probs(weights, row).gather(-1, target[:, None]).sum()

        each = vmap(grad(log_likelihood), in_dims=(None, 0, 0))(self.weights, rows, targets)
        return _plain({name: wide(W).square().sum(0) for name, W in each.items()})

    def expected_squares(self, row: Tensor, at_once: int) -> dict[str, Tensor]:
        """The same at every position of a row, of every next token by its probability."""
        log_probs, pull, *_ = vjp(lambda weights: self.log_probs(weights, row), self.weights)
        probs = log_probs.exp().flatten()
        sums = {name: torch.zeros_like(wide(W)) for name, W in self.weights.items()}
        for places in torch.arange(len(probs), device=row.device).split(at_once):
            ones = torch.zeros(len(places), len(probs), dtype=probs.dtype, device=row.device)
            ones[torch.arange(len(places)), places] = 1
            (each,) = vmap(pull)(ones.view(-1, *log_probs.shape))
            for name, W in each.items():
                weighted = wide(W).square().reshape(len(places), -1).T @ probs[places]
                sums[name] += weighted.view(W.shape[1:])
        return _plain(sums)


class _Run(nn.Module):
    """A model as one module, whose forward pass is ours."""

    def __init__(self, model: HookedTransformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return run(self.model, tokens)


def _plain(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): W for name, W in named.items()}


def _squares(
    of: _Gradients, tokens: Tensor, kind: str, draws: int | str, batch: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Squared gradients, some sequences after the others."""
    # Other kernels for attention take one sequence after the other under vmap.
    with sdpa_kernel(SDPBackend.MATH):
        if kind == "model" and draws == "all":
            for row in tokens:
                yield of.expected_squares(row, batch)
            return
        generator = torch.Generator(tokens.device).manual_seed(seed)
        for rows in batches(tokens, batch):
            if kind == "empirical":
                yield of.squares(rows, rows[:, 1:])
                continue
            with torch.no_grad():
                probs = wide(run(of.module.model, rows)[:, :-1]).softmax(-1)
            assert isinstance(draws, int)
            total: dict[str, Tensor] = {}
            for _ in range(draws):
                drawn = probs.flatten(0, 1).multinomial(1, generator=generator)
                squares = of.squares(rows, drawn.view(len(rows), -1))
                total = {name: W + total.get(name, 0) for name, W in squares.items()}
            yield {name: W / draws for name, W in total.items()}
