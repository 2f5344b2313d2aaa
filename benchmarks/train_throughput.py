"""Training throughput and memory: this engine, transformers with SDPA, stock HookedTransformer.

    python benchmarks/train_throughput.py [--json FILE]
    python benchmarks/train_throughput.py --shapes gpt2-small-1024 --device cuda

The same random GPT-2, batch, dtype, optimiser (fused AdamW, clipped at 1) and machine for all, in
one run: each lives in a process of its own, as it would in use, and they take turns at a few steps;
the median step counts. The engine runs as a user runs it, through `remove_norms` with a hook of the
user's and its own probes. Its norms are live, or all frozen ("removing"). Memory is the largest
resident set (on a GPU: the largest allocation) above what the loaded model takes.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from resident_memory import resident
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import lnfree_interp as lf
from lnfree_interp.data.sequences import ShuffledSequences
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.precision import bf16_is_fast
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import all_at_once
from lnfree_interp.removal.settings import Guard, Statistics


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and a batch."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    pos: int
    batch: int


SHAPES = {
    "4x256": Shape(4, 256, 4, 4096, 256, 16),
    "gpt2-small-512": Shape(12, 768, 12, 50257, 512, 2),
    "gpt2-small-1024": Shape(12, 768, 12, 50257, 1024, 16),
}
Contender = Literal["transformers", "stock", "engine, live", "engine, removing"]
CONTENDERS: tuple[Contender, ...] = ("transformers", "stock", "engine, live", "engine, removing")
Dtype = Literal["float32", "bfloat16"]


def hf_model(shape: Shape) -> GPT2LMHeadModel:
    """Random weights; no dropout, which HookedTransformer does not have."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=shape.n_layer, n_embd=shape.n_embd, n_head=shape.n_head, n_positions=shape.pos,
        vocab_size=shape.vocab_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def text_of(shape: Shape, sequences: int) -> Tensor:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocab_size, (sequences, shape.pos), generator=generator)


class Pace:
    """Lets a contender train as many steps as standard input says, and prints what they took.

    A number on a line is answered by the seconds of so many steps and the peak of memory in MB.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.before = torch.cuda.memory_allocated() / 1e6 if self.cuda else resident("VmRSS")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.left, self.seconds = 0, []
        self.began: float | None = None

    def next(self) -> None:
        """A step begins, so the one before has ended."""
        if self.cuda:
            torch.cuda.synchronize()
        if self.began is not None:
            self.seconds.append(time.perf_counter() - self.began)
        if self.left == 0:
            if self.began is not None:
                peak = torch.cuda.max_memory_allocated() / 1e6 if self.cuda else resident("VmHWM")
                print(json.dumps([self.seconds, peak - self.before]), flush=True)
                self.seconds = []
            self.left = int(sys.stdin.readline())
        self.left -= 1
        self.began = time.perf_counter()


def plain_loop(contender: Contender, shape: Shape, dtype: Dtype, device: str) -> None:
    """Train transformers' model or the stock one without end."""
    source = hf_model(shape)
    if contender == "transformers":
        model = source.to(device)
    else:
        model = lf.load(source, device=device, check=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    text = text_of(shape, 4 * shape.batch).to(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    pace = Pace(device)
    for index in count():
        pace.next()
        tokens = text[shape.batch * (index % 4) :][: shape.batch]
        with autocast:
            if contender == "transformers":
                loss = model(tokens, labels=tokens, use_cache=False).loss
            else:
                loss = next_token_loss(model(tokens), tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


class Paced(ShuffledSequences):
    """Text whose every batch waits for its turn."""

    def __init__(self, text: Tensor, batch: int, pace: Pace):
        super().__init__(text, seed=0)
        self.batch, self.pace = batch, pace

    def take(self, n: int) -> Tensor:
        """The next n sequences, when it is this contender's turn."""
        if n == self.batch:  # else it is what sigma is measured on
            self.pace.next()
        return super().take(n)


def engine(contender: Contender, shape: Shape, dtype: Dtype, device: str) -> None:
    """The same by `remove_norms`, in place as `lnfree remove` does it."""
    model = lf.load(hf_model(shape), device=device, check=False)
    removing = contender == "engine, removing"
    recipe = Recipe(
        events=all_at_once(model, step=0) if removing else (),
        steps=1_000_000,
        batch=shape.batch,
        micro_batch=shape.batch,
        lr=1e-4,
        warmup=0,
        final_lr=1.0,
        precision=dtype,
        scale_anchor=0.1 if removing else 0.0,
        statistics=Statistics(sequences=1),
        guard=Guard(above_best=1e6, sigma_factor=1e6),  # random weights: nothing to guard
    )
    seen: list[int] = []
    hooks = [("blocks.0.hook_mlp_out", lambda x, hook: seen.append(len(x)))]
    text = Paced(text_of(shape, 4 * shape.batch), shape.batch, Pace(device))
    lf.remove_norms(model, recipe, text, fwd_hooks=hooks, progress=False, copy_weights=False)


def serve(name: Contender, shape: Shape, dtype: Dtype, device: str) -> None:
    """Be a contender."""
    make = engine if name.startswith("engine") else plain_loop
    make(name, shape, dtype, device)


class Server:
    """A contender in a process of its own."""

    def __init__(self, name: Contender, shape: str, dtype: Dtype, device: str):
        command = [sys.executable, "-W", "ignore", __file__, "--serve", name, "--shapes", shape]
        self.process = subprocess.Popen(
            [*command, "--dtypes", dtype, "--device", device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def train(self, steps: int) -> tuple[list[float], float]:
        """Seconds of each step, and the peak of memory so far in MB."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("[["):
                seconds, peak = json.loads(line)
                return seconds, peak
        raise RuntimeError(f"{self.process.args} stopped with {self.process.wait()}")


def main(
    shapes: tuple[str, ...] = ("4x256", "gpt2-small-512"),
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16"),
    device: str = "cpu",
    rounds: int = 5,
    steps: int = 4,
    serve_: Annotated[Contender | None, tyro.conf.arg(name="serve")] = None,
    out: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Run the benchmark.

    Args:
        shapes: Some of 4x256, gpt2-small-512 and gpt2-small-1024.
        dtypes: float32, and bfloat16 autocast over float32 weights.
        device: cpu or cuda.
        rounds: In each, every contender trains some steps.
        steps: Per round.
        serve_: Be the process of one contender (used by the benchmark itself).
        out: Also write the rows there.
    """
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if serve_ is not None:
        serve(serve_, SHAPES[shapes[0]], dtypes[0], device)
        return
    rows = []
    print(
        "| shape | dtype | contender | tokens/s | to transformers | memory, MB | to transformers |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for shape in shapes:
        for dtype in dtypes:
            rows += one_table(shape, dtype, device, rounds, steps)
    native = bf16_is_fast(torch.device(device))
    print(f"medians of {rounds} x {steps} steps; bfloat16 native: {native}")
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {name}")
    if out is not None:
        out.write_text(json.dumps({"hardware": name, "rows": rows}, indent=1) + "\n")


def one_table(shape: str, dtype: Dtype, device: str, rounds: int, steps: int) -> list[dict]:
    """The rows of one shape and dtype."""
    size = SHAPES[shape]
    servers = {name: Server(name, shape, dtype, device) for name in CONTENDERS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory: dict[str, float] = {}
    for server in servers.values():
        server.train(1)
    for _ in range(rounds):
        for name, server in servers.items():
            new, memory[name] = server.train(steps)
            seconds[name] += new
    for server in servers.values():
        server.process.kill()
    tokens, rows = size.batch * size.pos, []
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name in CONTENDERS:
        row = {
            "shape": shape, "dtype": dtype, "contender": name,
            "tokens_per_second": tokens / median[name],
            "speed": median["transformers"] / median[name],
            "memory_mb": memory[name],
            "memory": memory[name] / memory["transformers"],
        }  # fmt: skip
        rows.append(row)
        print(
            f"| {shape} | {dtype} | {name} | {row['tokens_per_second']:,.0f} "
            f"| {row['speed']:.2f} | {row['memory_mb']:,.0f} | {row['memory']:.2f} |",
            flush=True,
        )
    return rows


def _cpu() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return f"{torch.get_num_threads()} threads of {name}"


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
