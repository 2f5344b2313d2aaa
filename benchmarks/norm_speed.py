"""Time of a forward pass, and of a step of training, by architecture, side by side.

    python benchmarks/norm_speed.py [--d-model 256 --n-layers 6 --rounds 15]

Every architecture takes its turn in each round; the table has medians over rounds and the median
of each round's ratio to Pre-LN. Models with norm sites run norms and attention in torch's fused
kernels where there is one (LayerNorm, RMSNorm). Stock models run TransformerLens' own modules, and
are compared with the stock Pre-LN model; the stream of Pre-CRMSNorm has a channel less.
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch
import tyro
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers.utils import logging

import lnfree_interp as lf
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.running import run

ARCHITECTURES: dict[str, Callable[[HookedTransformer], HookedTransformer]] = {
    "Pre-LN": lf.with_norm_sites,
    "RMSNorm": lambda model: lf.to_map(model, "RMSNorm", bias=False).model,
    "CRMSNorm": lambda model: lf.to_map(model, "CRMSNorm", bias=False).model,
    "Peri-LN": lambda model: lf.to_peri_ln(model).model,
    "NormFormer": lambda model: lf.to_normformer(model).model,
    "Sub-LN": lambda model: lf.to_sub_ln(model).model,
    "LayerNorm Scaling": lambda model: lf.to_layernorm_scaling(model).model,
    "DyT": lambda model: lf.to_dyt(model).model,
    "constants": lambda model: frozen(model),
    "stock: Pre-LN": lambda model: model,
    "stock: Pre-RMSNorm, `to_rms`": lambda model: lf.to_rms(model).model,
    "stock: Pre-CRMSNorm, `to_crms`": lambda model: lf.to_crms(model).model,
    "stock: LN-free, `fold`": lambda model: lf.fold(frozen(model)),
}


def frozen(model: HookedTransformer) -> HookedTransformer:
    """Norms that divide by a constant."""
    sited = lf.with_norm_sites(model)
    for site in lf.list_norm_sites(sited):
        lf.freeze_site(sited, site, 1.0)
    return sited


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(
    d_model: int = 256,
    n_layers: int = 6,
    n_heads: int = 8,
    batch: int = 4,
    length: int = 128,
    rounds: int = 15,
) -> None:
    """Run the benchmark.

    Args:
        d_model: Width of the stream.
        n_layers: Number of blocks.
        n_heads: Heads of each block.
        batch: Sequences of a pass.
        length: Tokens of a sequence.
        rounds: How often every architecture takes its turn, after two that do not count.
    """
    logging.disable_progress_bar()
    like = lf.load(lf.bundled_checkpoint(), device="cpu")
    new = lf.untrained(like, d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_ctx=length)
    models = {name: make(new) for name, make in ARCHITECTURES.items()}
    optimizers = {name: torch.optim.AdamW(m.parameters(), 1e-5, fused=True)
                  for name, m in models.items()}  # fmt: skip
    tokens = torch.randint(like.cfg.d_vocab, (batch, length),
                           generator=torch.Generator().manual_seed(0))  # fmt: skip

    @torch.no_grad()
    def forward(name: str) -> Tensor:
        return run(models[name], tokens, n_layers)

    def step(name: str) -> None:
        next_token_loss(run(models[name], tokens), tokens).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    found: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "step": []} for name in models
    }
    for turn in range(rounds + 2):
        for name in models:
            times = {"forward": seconds(lambda name=name: forward(name)),
                     "step": seconds(lambda name=name: step(name))}  # fmt: skip
            for what, value in times.items():
                if turn >= 2:
                    found[name][what].append(value)
    print("| architecture | forward pass, blocks alone | over Pre-LN | step of training | "
          "over Pre-LN |\n|---|---|---|---|---|")  # fmt: skip
    for name, times in found.items():
        cells = []
        for what in ("forward", "step"):
            base = found["stock: Pre-LN" if name.startswith("stock") else "Pre-LN"]
            ratios = [a / b for a, b in zip(times[what], base[what], strict=True)]
            cells += [f"{1000 * statistics.median(times[what]):.1f} ms",
                      f"{statistics.median(ratios):.3f}"]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    print(
        f"\n{n_layers} layers, d_model {d_model}, {batch} x {length} tokens, float32; {rounds} "
        f"rounds; torch {torch.__version__}, {torch.get_num_threads()} threads of {cpu}"
    )


if __name__ == "__main__":
    tyro.cli(main)
