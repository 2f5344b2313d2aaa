"""The second stage of training with banks: one unembedding for all, as banks are selected."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from lnfree_interp.data.sequences import ShuffledSequences
from lnfree_interp.errors import RecipeError, TrainingError
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.running import run
from lnfree_interp.numerics import soft_cap
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import cosine_with_warmup, extremes


def require_plain(recipe: Recipe) -> None:
    """Refuse a recipe that asks for more than cross-entropy of the text.

    Raises:
        RecipeError: saying which setting.
    """
    more = {
        "events": bool(recipe.events),
        "release": bool(recipe.release),
        "distillation": extremes(recipe.distillation)[1] > 0,
        "scale_anchor": extremes(recipe.scale_anchor)[1] > 0,
        "losses": bool(recipe.losses),
        "weight_average": recipe.weight_average > 0,
    }
    if found := [name for name, is_so in more.items() if is_so]:
        raise RecipeError(
            f"the unembedding is trained on cross-entropy alone, and the recipe has {found[0]}: "
            "give lf.recipes.finetuning(...)"
        )


def train_unembedding(
    shared: HookedTransformer,
    names: set[str],
    models: Mapping[str, HookedTransformer],
    tokens: Int[Tensor, "sequence pos"],
    domains: list[str],
    recipe: Recipe,
    progress: bool,
) -> tuple[float, ...]:
    """Train the unembedding that models share, behind the streams that each makes.

    Args:
        shared: Has the unembedding, untied; changed in place.
        names: Which of its parameters are trained, such as `W_U`.
        models: By domain, with its bank.
        tokens: The text of all domains.
        domains: The bank of each sequence.
        recipe: Steps, batch, rates, decay, clipping and seed are read.
        progress: Whether to show a progress bar.

    Returns:
        The loss of each step, in nats per token.

    Raises:
        TrainingError: if the loss is not finite.
    """
    head = shared.unembed
    weights = {name: W for name, W in head.named_parameters() if name in names}
    groups = [
        {"params": [W for n, W in weights.items() if n.startswith("W_")],
         "weight_decay": recipe.weight_decay},
        {"params": [W for n, W in weights.items() if n.startswith("b_")], "weight_decay": 0.0},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
    # Numbers of sequences are shuffled, so that each keeps its bank.
    order = ShuffledSequences(torch.arange(len(tokens))[:, None], recipe.seed)
    cap = shared.cfg.output_logits_soft_cap
    n_layers = shared.cfg.n_layers
    device = shared.W_E.device
    losses = []
    with torch.enable_grad():
        for step in tqdm(range(recipe.steps), "unembedding", disable=not progress):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * cosine_with_warmup(
                    step, steps=recipe.decay_steps or recipe.steps, warmup=recipe.warmup,
                    floor=recipe.final_lr,
                )  # fmt: skip
            batch = order.take(recipe.batch)[:, 0].tolist()
            total = 0.0
            for domain, rows in grouped(batch, lambda i: domains[i]).items():
                for some in torch.tensor(rows).split(recipe.micro_batch):
                    text = tokens[some].to(device)
                    model = models[domain]
                    with torch.no_grad():
                        x = model.ln_final(run(model, text, stop_at_layer=n_layers))
                    loss = next_token_loss(soft_cap(head(x), cap), text)
                    (loss * len(some) / len(batch)).backward()
                    total += loss.item() * len(some) / len(batch)
            if not torch.isfinite(torch.tensor(total)):
                raise TrainingError(
                    f"the loss is {total} at step {step} of the unembedding: give a lower lr than "
                    f"{recipe.lr:g}"
                )
            torch.nn.utils.clip_grad_norm_(list(weights.values()), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return tuple(losses)


def grouped(items: list[int], by: Callable[[int], str]) -> dict[str, list[int]]:
    """Numbers by what a function says of them, in the order in which that first occurs."""
    found: dict[str, list[int]] = {}
    for item in items:
        found.setdefault(by(item), []).append(item)
    return found
