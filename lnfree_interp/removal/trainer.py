"""The fine-tuning that removes norms: fire events, train, log, with the user's hooks active."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import HookedTransformer

from lnfree_interp.errors import RecipeError, TrainingError
from lnfree_interp.models.sites import freeze_site, get_norm, with_norm_sites
from lnfree_interp.removal.objectives import next_token_loss, scale_anchor_loss
from lnfree_interp.removal.recipes import Recipe
from lnfree_interp.removal.schedule import cosine_with_warmup
from lnfree_interp.removal.statistics import measure_sigma

Hooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., object]]]
"""TransformerLens' own form: (name or filter, function of the activation and `hook`)."""


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step."""

    step: int
    loss: float
    """Cross-entropy in nats per token, on this step's batch."""
    anchor: float
    """The scale anchor before its weight."""
    lr: float
    frozen: dict[str, float]
    """Sites frozen just before this step, and their sigma."""


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning."""

    model: HookedTransformer
    """With norm sites: frozen where the recipe says so. `fold` takes it from here."""
    recipe: Recipe
    history: tuple[StepRecord, ...]
    seconds: float


def remove_norms(
    model: HookedTransformer,
    recipe: Recipe,
    data: Int[Tensor, "blocks pos"],
    *,
    fwd_hooks: Hooks = (),
    bwd_hooks: Hooks = (),
    progress: bool = True,
) -> Run:
    """Fine-tune a copy of the model while its norms are frozen one by one.

    Args:
        model: A stock LayerNorm `HookedTransformer`; it is not changed.
        recipe: What to do when; `recipe.vanilla()` gives the control run.
        data: Packed text, such as `pack(...)`; drawn without replacement in an order that depends
            on `recipe.seed` alone, and again from the start when it is used up.
        fwd_hooks: As in `run_with_hooks`; active in every training forward. A hook may change its
            activation. `blocks.{l}.ln1.hook_*` is `ln1.qk.hook_*` and `ln1.v.hook_*` here.
        bwd_hooks: As in `run_with_hooks`; active in every backward.
        progress: Whether to show a progress bar.

    Returns:
        The trained model with its sites, and what happened at each step.

    Raises:
        UnsupportedModelError: if the model's norms are not LayerNorms before each sublayer.
        NormSiteError: if the recipe names a site that the model does not have.
        RecipeError: if there is less text than one batch.
        TrainingError: if the loss stops being a number.
    """
    if len(data) < recipe.batch:
        raise RecipeError(f"the data has {len(data)} blocks, one batch takes {recipe.batch}")
    began = time.monotonic()
    model = with_norm_sites(model)
    for event in recipe.events:
        get_norm(model, event.site)
    device = model.W_E.device
    optimizer = _adamw(model, recipe)
    final_resid: list[Tensor] = []
    final_name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    capture = (final_name, lambda resid, hook: final_resid.append(resid))
    order = _block_order(len(data), recipe)
    history: list[StepRecord] = []
    n_frozen = 0
    bar = tqdm(
        total=recipe.steps,
        desc="removing norms" if recipe.events else "control",
        unit="step",
        disable=not progress,
    )
    with bar, torch.enable_grad():
        for step in range(recipe.steps):
            frozen = _fire_events(model, recipe, data, step)
            lr = recipe.lr * cosine_with_warmup(
                step, steps=recipe.steps, warmup=recipe.warmup, floor=recipe.final_lr
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            tokens = data[next(order)].to(device)
            with model.hooks([*fwd_hooks, capture], list(bwd_hooks)):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
                    logits = model(tokens)
                loss = next_token_loss(logits, tokens)
                anchor = scale_anchor_loss(final_resid.pop(), _ordinary(tokens, model))
                (loss + recipe.scale_anchor * anchor).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            history.append(StepRecord(step, loss.item(), anchor.item(), lr, frozen))
            if not loss.isfinite():
                raise TrainingError(
                    f"the loss is {loss.item()} at step {step}: lower lr, or widen the gaps "
                    "between events"
                )
            n_frozen += len(frozen)
            bar.set_postfix(_status(history[-1], n_frozen, len(recipe.events)), refresh=False)
            bar.update()
    return Run(model.eval(), recipe, tuple(history), time.monotonic() - began)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products are native there; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False


def _adamw(model: HookedTransformer, recipe: Recipe) -> torch.optim.AdamW:
    """Weight decay by TransformerLens' names: b_Q and b_K are matrices by shape, but biases."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if name.rpartition(".")[2].startswith("W_") else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def _block_order(n_blocks: int, recipe: Recipe) -> Iterator[Int[Tensor, " batch"]]:
    """Which blocks make each step's batch: shuffled epochs, the same for a run and its control."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        epoch = torch.randperm(n_blocks, generator=generator)
        yield from epoch[: n_blocks - n_blocks % recipe.batch].split(recipe.batch)


def _fire_events(
    model: HookedTransformer, recipe: Recipe, data: Int[Tensor, "blocks pos"], step: int
) -> dict[str, float]:
    """Freeze the sites whose step has come, at the sigma that they show at this moment."""
    due = [event.site for event in recipe.events if event.step == step]
    if not due:
        return {}
    generator = torch.Generator().manual_seed(recipe.seed + step)
    sample = torch.randperm(len(data), generator=generator)[: recipe.sigma_blocks]
    sigmas = measure_sigma(model, due, data[sample].to(model.W_E.device))
    for name, sigma in sigmas.items():
        freeze_site(model, name, sigma)
    return sigmas


def _ordinary(tokens: Int[Tensor, "batch pos"], model: HookedTransformer) -> Tensor:
    """False at position 0 and at end-of-text."""
    ordinary = torch.ones_like(tokens, dtype=torch.bool)
    ordinary[:, 0] = False
    eos = getattr(model.tokenizer, "eos_token_id", None)
    return ordinary if eos is None else ordinary & (tokens != eos)


def _status(record: StepRecord, n_frozen: int, n_events: int) -> dict[str, str]:
    """What the progress bar says beside step, speed and time left."""
    status = {"loss": f"{record.loss:.3f}"}
    if n_events:
        status["frozen"] = f"{n_frozen}/{n_events}"
    if record.frozen:
        status["event"] = next(reversed(record.frozen))
    return status
