"""The fine-tuning that removes norms: fire events, train, log, with the user's hooks active."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from lnfree_interp.errors import RecipeError, TrainingError
from lnfree_interp.models.agreement import require_tokens
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.sites import freeze_site, get_norm, with_norm_sites
from lnfree_interp.removal.objectives import distillation_loss, scale_anchor_loss
from lnfree_interp.removal.recipes import Recipe
from lnfree_interp.removal.schedule import cosine_with_warmup
from lnfree_interp.removal.statistics import Hooks, measure_sigma


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
        fwd_hooks: As in `run_with_hooks`; active in every training forward, and (without gradient)
            while a sigma is measured. A hook may change its activation, which is bfloat16 inside
            a block where `bf16_is_fast`. A step makes one forward per micro-batch. What is
            `blocks.{l}.ln1.hook_*` elsewhere is `ln1.qk.hook_*` and `ln1.v.hook_*` here.
        bwd_hooks: As in `run_with_hooks`; active in every backward.
        progress: Whether to show a progress bar.

    Returns:
        The trained model with its sites, and what happened at each step.

    Raises:
        UnsupportedModelError: if the model's norms are not LayerNorms before each sublayer.
        NormSiteError: if the recipe names a site that the model does not have.
        RecipeError: if there is less text than one batch.
        DataError: if the model cannot read the data.
        TrainingError: if loss or gradient stop being numbers.
    """
    if len(data) < recipe.batch:
        raise RecipeError(f"the data has {len(data)} blocks, one batch takes {recipe.batch}")
    require_tokens(model, data)
    if data.shape[1] < 2:
        raise RecipeError("a block of one token has no next token to learn")
    began = time.monotonic()
    teacher = with_norm_sites(model) if recipe.distillation > 0 else None
    model = with_norm_sites(model)
    for event in recipe.events:
        get_norm(model, event.site)
    device = model.W_E.device
    data = data.to(device)
    optimizer = _adamw(model, recipe)
    objective = _Objective(model, recipe, teacher)
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
            frozen = _fire_events(model, recipe, data, step, fwd_hooks)
            lr = recipe.lr * cosine_with_warmup(
                step, steps=recipe.steps, warmup=recipe.warmup, floor=recipe.final_lr
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = data[next(order)]
            loss = anchor = 0.0
            with model.hooks([*fwd_hooks, objective.probe], list(bwd_hooks)):
                for tokens in batch.split(recipe.micro_batch):
                    share = len(tokens) / len(batch)
                    total, *parts = objective(tokens)
                    (share * total).backward()
                    loss, anchor = (
                        so_far + share * part.item()
                        for so_far, part in zip((loss, anchor), parts, strict=True)
                    )
            gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            if not (math.isfinite(loss) and gradient.isfinite()):
                raise TrainingError(
                    f"loss {loss:.4g}, gradient norm {gradient.item():.4g} at step {step}: lower "
                    "lr, or widen the gaps between events"
                )
            optimizer.step()
            optimizer.zero_grad()
            history.append(StepRecord(step, loss, anchor, lr, frozen))
            n_frozen += len(frozen)
            bar.set_postfix(_status(history[-1], n_frozen, len(recipe.events)), refresh=False)
            bar.update()
    return Run(model.eval(), recipe, tuple(history), time.monotonic() - began)


class _Objective:
    """The loss of some blocks: cross-entropy, distillation and scale anchor as the recipe says."""

    def __init__(self, model: HookedTransformer, recipe: Recipe, teacher: HookedTransformer | None):
        self.model, self.recipe, self.teacher = model, recipe, teacher
        self.device = model.W_E.device
        self.bf16 = bf16_is_fast(self.device)
        self.final_resid: Tensor | None = None
        self.probe = (f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", self._keep)

    def _keep(self, resid: Tensor, hook: HookPoint) -> None:
        self.final_resid = resid

    def _logits(self, model: HookedTransformer, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return model(tokens)

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor, Tensor]:
        """What to descend, then its cross-entropy and its scale anchor before their weights."""
        logits = self._logits(self.model, tokens)
        assert self.final_resid is not None
        anchor = scale_anchor_loss(self.final_resid, _ordinary(tokens, self.model))
        self.final_resid = None
        total = loss = next_token_loss(logits, tokens)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self._logits(self.teacher, tokens)
            total = torch.lerp(loss, distillation_loss(logits, taught), self.recipe.distillation)
        return total + self.recipe.scale_anchor * anchor, loss, anchor


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
    model: HookedTransformer,
    recipe: Recipe,
    data: Int[Tensor, "blocks pos"],
    step: int,
    fwd_hooks: Hooks,
) -> dict[str, float]:
    """Freeze the sites whose step has come, at the sigma that they show at this moment."""
    due = [event.site for event in recipe.events if event.step == step]
    if not due:
        return {}
    generator = torch.Generator().manual_seed(recipe.seed + step)
    sample = torch.randperm(len(data), generator=generator)[: recipe.sigma_blocks]
    sigmas = measure_sigma(model, due, data[sample], fwd_hooks)
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
