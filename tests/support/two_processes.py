"""Trains a small model and prints its losses; started once or as several gloo processes."""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch.distributed.fsdp import fully_shard

import lnfree_interp as lf
from lnfree_interp.models.sites import stock_weights
from lnfree_interp.removal.losses import Objective
from lnfree_interp.removal.processes import Processes
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import published_order, sequential_sites
from lnfree_interp.removal.settings import Special, Statistics
from lnfree_interp.removal.training_state import fingerprint
from support.models import make_gpt2


def fully_sharded(self: Processes, module: Objective, optimizer: torch.optim.Optimizer):
    """What Accelerate does for FSDP 2; on a CPU it would quietly take DDP instead."""
    for block in module.model.blocks:
        fully_shard(block)
    fully_shard(module)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "fused")}
    names = dict(module.model.named_parameters())
    decayed = [p for name, p in names.items() if name.rpartition(".")[2].startswith("W_")]
    kept = [p for name, p in names.items() if not name.rpartition(".")[2].startswith("W_")]
    optimizer.param_groups.clear()
    optimizer.add_param_group(group | {"params": decayed})
    optimizer.add_param_group(group | {"params": kept, "weight_decay": 0.0})
    self.wrapped = module
    self.synchronised = lambda last: nullcontext(module.set_requires_gradient_sync(last))
    return module, optimizer


def moved_outside(model, run) -> list[str]:
    """The parameters of which an entry changed that the recipe does not train."""
    words = run.recipe.trainable
    mask = lf.select_parameters(model, *([words] if isinstance(words, str) else words))
    before, after = stock_weights(lf.with_norm_sites(model)), stock_weights(run.model)
    return [
        name for name, W in after.items()
        if ((before[name] != W) & ~mask.chosen.get(name, torch.zeros_like(W).bool())).any()
        and not (name == "unembed.W_U" and "embed.W_E" in mask.chosen)
    ]  # fmt: skip


def main() -> None:
    """Arguments: the run's folder; `resume` to go on with it; `fsdp` to spread the weights;
    `part` to train some of them; `int8` to compute in integers."""
    if "fsdp" in sys.argv:
        Processes.prepare = fully_sharded
    model = lf.load(make_gpt2(n_layer=2), device="cpu")
    data = torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))
    recipe = Recipe(
        events=published_order(sequential_sites(2), start=1, ln2_gap=1, qk_gap=1, v_gap=1),
        steps=12, batch=8, micro_batch=2, lr=1e-3, warmup=2, final_lr=0.1, precision="float32",
        distillation=0.5, scale_anchor=0.1, anchor_target="frozen", evaluate_every=3,
        statistics=Statistics(source="ema", sequences=8, tokens="ordinary"),
        special=Special(first_until=9), weight_average=0.8,
    )  # fmt: skip
    if "part" in sys.argv:
        recipe = replace(recipe, trainable=("L0H1", "30% of norms"))
    if "int8" in sys.argv:
        recipe = replace(recipe, precision="int8")
    fired = []
    run = lf.remove_norms(
        model, recipe, data, heldout=data[:6], out=sys.argv[1], resume="resume" in sys.argv,
        fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: fired.append(len(x)))],
        checkpoint_every=5, log_every=4, progress=False,
    )  # fmt: skip
    report = {
        "losses": [record.loss for record in run.history],
        "gradients": [record.gradient for record in run.history],
        "distillation": [record.losses["distillation"] for record in run.history],
        "sigma": {k: v for record in run.history for k, v in record.frozen.items()},
        "heldout": [r.heldout for r in run.history if r.heldout is not None],
        "drift": [r.probes["drift"] for r in run.history if r.probes],
        "weights": fingerprint(run.model),
        "forwards": len(fired),
        "moved": moved_outside(model, run),
    }
    rank = os.environ.get("RANK", "0")
    with open(f"{sys.argv[1]}-{rank}.json", "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main()
