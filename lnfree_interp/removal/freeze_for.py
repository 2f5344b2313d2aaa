"""Freeze the norms that a question reads through, and say what that costs."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.norms_read import Question, norms_read
from lnfree_interp.analysis.prompts import read_sequences
from lnfree_interp.analysis.targets import Target
from lnfree_interp.data.named import spread
from lnfree_interp.errors import DataError, NormSiteError, RecipeError
from lnfree_interp.evaluation.text_pass import measure_text
from lnfree_interp.models.site_names import NormSite, name_sites
from lnfree_interp.models.sites import list_norm_sites, live_sites, norm_at, with_norm_sites
from lnfree_interp.removal.freezing import freeze_in_one_pass
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.remove import remove_norms
from lnfree_interp.removal.run import Run
from lnfree_interp.removal.schedule import Event
from lnfree_interp.removal.settings import Special, Statistics

MEASURED = 8192
"""How many tokens constants are measured on, in one batch, spread over the text."""
HELD_OUT = 0.25
"""The share of a text that the price is measured on, if no other text is given for it."""


@dataclass(frozen=True)
class Price:
    """How far a model is from the one that it was made from, on held-out text."""

    before: float
    """Cross-entropy of the given model, in nats per token."""
    after: float
    """Cross-entropy of the frozen one."""
    divergence: float
    """KL divergence of its predictions from the given model's, in nats per token."""
    agreement: float
    """The share of tokens at which both find the same next token most likely."""
    n_tokens: int
    """How many predictions were compared."""

    @property
    def added(self) -> float:
        """Cross-entropy added, in nats per token."""
        return self.after - self.before

    def __str__(self) -> str:
        return (
            f"{self.added:+.4f} nats per token ({self.before:.4f} to {self.after:.4f}), KL "
            f"{self.divergence:.4f}, top-1 agreement {self.agreement:.1%}, on {self.n_tokens:,} "
            "held-out tokens"
        )


@dataclass(frozen=True, eq=False)
class FrozenFor:
    """A model on which a question is exact, and what that costs.

    Attributes:
        model: With norm sites; those that the question reads through are frozen. `lf.export(model,
            folder, target="transformer_lens")` saves it.
        sites: The sites that were frozen.
        constants: By site, what it divides by, and what it divides first tokens by.
        price: What freezing costs on held-out text.
        run: The training, if there was any.
    """

    model: HookedTransformer
    sites: tuple[NormSite, ...]
    constants: Mapping[str, tuple[float, float]]
    price: Price
    run: Run | None = None

    def __repr__(self) -> str:
        what = name_sites(map(str, self.sites)) or "nothing, all that it reads is affine"
        trained = f" after {self.run.recipe.steps} steps" if self.run else " without training"
        return f"FrozenFor({what}{trained}: {self.price})"


def freeze_for(
    model: HookedTransformer,
    question: Question | str | NormSite | Iterable[str | NormSite],
    text: Int[Tensor, "sequence pos"],
    steps: int = 0,
    *,
    heldout: Int[Tensor, "heldout_sequence heldout_pos"] | None = None,
    first: bool = True,
    lr: float = 5e-5,
    batch: int = 2,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> FrozenFor:
    """Make one question exact: freeze the norms that it reads through, and measure the price.

    Exactness is local. Direct logit attribution reads the stream through `ln_final` alone, the
    scores of a head through its own `ln1.qk`; all other norms stay live. On the result that
    question is exact, and every other is refused, or held by name, as on the model before.

    Args:
        model: A model with live norms; it does not change. One with norm sites of which some are
            frozen keeps those.
        question: What is to be exact: a target, such as `lf.LogitDifference(...)`; a function that
            asks a trace, such as `lambda trace: lf.flow_graph(trace, " Paris")`; or norm sites by
            name. `lf.norms_read` lists what a question reads through.
        text: Token ids [sequence, pos], such as `pack(...)`: text on which constants are measured
            and the model is trained.
        steps: Steps of training after freezing, by distillation from the given model. Default:
            none.
        heldout: Text to measure the price on. Default: the last quarter of `text`, which nothing
            else then sees.
        first: Whether the first token of a prompt keeps a constant of its own, which costs nothing
            and often saves most of the price; such a site cannot be folded.
        lr: Peak learning rate of the training.
        batch: Sequences per step of the training.
        out: A new folder for metrics and checkpoints of the training, if there is any. Default:
            nothing is written.
        resume: Continue the training in `out`.
        progress: Whether to show progress bars.

    Returns:
        A `FrozenFor`; its repr says what was frozen, and the price in nats, KL and top-1 agreement.

    Raises:
        NormSiteError: for a site that the model does not have.
        DataError: if the model cannot read the text, the text is too short, or the question cannot
            be asked of it.
        UnsupportedModelError: if the model's norms cannot be frozen one by one.
        RecipeError: if `out` or `resume` is given for no steps.
        TrainingError: if the training diverges.

    Source:
        Ours.

    Examples:
        >>> target = lf.LogitDifference(" range", " self")
        >>> frozen = lf.freeze_for(model, target, tokens, progress=False)
        >>> [str(site) for site in frozen.sites]
        ['ln_final']
        >>> lf.attribute(frozen.model, "for i in", target).verify().held
        ()
    """
    if steps == 0 and (resume or out is not None):
        raise RecipeError("steps=0 trains nothing, so out and resume have nothing to keep")
    tokens = read_sequences(model, text, packed=True).cpu()
    if heldout is None:
        kept = round(len(tokens) * (1 - HELD_OUT))
        if not 0 < kept < len(tokens):
            raise DataError(
                f"{len(tokens)} sequences were given, and the price is measured on a quarter of "
                "them: give at least two, or heldout="
            )
        tokens, heldout = tokens[:kept], tokens[kept:]
    else:
        heldout = read_sequences(model, heldout, packed=True).cpu()
    wanted = _sites(model, question, tokens)
    sites = tuple(site for site in wanted if site in live_sites(model))
    run, few = None, max(1, min(len(tokens), MEASURED // tokens.shape[1]))
    if steps and sites:
        recipe = _recipe(sites, steps, lr, batch, first, few)
        run = remove_norms(
            model, recipe, tokens, heldout=heldout[:few], out=out, resume=resume,
            progress=progress,
        )  # fmt: skip
        frozen = run.model
    else:
        frozen = with_norm_sites(model)
        freeze_in_one_pass(frozen, sites, spread(tokens, few), first=first)
    price = measure_price(frozen, model, heldout, progress=progress)
    return FrozenFor(frozen, sites, _constants(frozen, sites), price, run)


def _sites(model: HookedTransformer, question: Any, tokens: Tensor) -> tuple[NormSite, ...]:
    """The sites that a question reads through, or those that were named."""
    if isinstance(question, Target) or callable(question):
        return norms_read(model, tokens[0], question)
    named = [question] if isinstance(question, str | NormSite) else list(question)
    sites = [site if isinstance(site, NormSite) else NormSite.parse(site) for site in named]
    known = list_norm_sites(model)
    if unknown := [site for site in sites if site not in known]:
        raise NormSiteError(
            f"{unknown[0]} is not a norm site of the model: give some of "
            f"{name_sites(map(str, known))}"
        )
    return tuple(sorted(dict.fromkeys(sites), key=lambda site: site.order))


def _recipe(
    sites: tuple[NormSite, ...], steps: int, lr: float, batch: int, first: bool, measured: int
) -> Recipe:
    """Freeze at once, then distil."""
    if steps < 2:
        raise RecipeError(f"steps={steps}: give 0 for no training, or at least 2")
    return Recipe(
        name="freeze for a question",
        events=tuple(Event(0, site) for site in sites),
        steps=steps,
        batch=batch,
        lr=lr,
        warmup=min(20, steps // 5),
        final_lr=0.1,
        distillation=1.0,
        scale_anchor=0.0,
        statistics=Statistics(tokens="ordinary", sequences=measured),
        special=Special(keep_first=first),
    )


def _constants(
    model: HookedTransformer, sites: tuple[NormSite, ...]
) -> dict[str, tuple[float, float]]:
    found = {}
    for site in sites:
        norm = norm_at(model, site)
        assert norm.scale is not None
        found[str(site)] = (norm.scale, norm.scale if norm.first is None else norm.first)
    return found


def measure_price(
    model: HookedTransformer,
    original: HookedTransformer,
    heldout: Int[Tensor, "sequence pos"],
    *,
    progress: bool = False,
) -> Price:
    """How far a model is from the one that it was made from.

    Args:
        model: The new model.
        original: What it was made from.
        heldout: Token ids [sequence, pos] that no constant was measured on.
        progress: Whether to show a progress bar.
    """
    both = {"before": original, "after": model}
    found = measure_text(both, heldout, "before", progress=progress)
    before, after = found["before"], found["after"]
    assert after.kl is not None
    assert after.agrees is not None
    return Price(
        before.loss.mean().item(), after.loss.mean().item(), after.kl.double().mean().item(),
        after.agrees.double().mean().item(), after.loss.numel(),
    )  # fmt: skip
