"""What it saves to keep freed memory in the process, as the commands that train do.

    make smollm2
    python benchmarks/freed_memory.py

Steps of distillation of SmolLM2-135M at the shape of its removal, sequences of 256 tokens, with and
without `keep_freed_memory`, each in a process of its own, in turns; medians. glibc only.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
from dataclasses import replace

import torch
import tyro

import lnfree_interp as lf
from lnfree_interp.cli.memory import keep_freed_memory

LENGTH = 256
SHAPES = (("bfloat16", 1), ("bfloat16", 4), ("float32", 1))


def measure(precision: str, batch: int, keep: bool, steps: int) -> None:
    """Train and print the seconds of every step but the first two, and the peak in MB."""
    if keep:
        keep_freed_memory()
    model = lf.load(lf.smollm2(), device="cpu", check=False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, model.cfg.d_vocab, (batch * steps, LENGTH), generator=generator)
    recipe = lf.recipes.finetuning(steps=steps, batch=batch, distillation=1.0)
    recipe = replace(recipe, micro_batch=batch, precision=precision, losses={"stream": 1.0})
    run = lf.finetune(model, recipe, tokens, progress=False, log_every=0, copy_weights=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([[record.seconds for record in run.history[2:]], peak]))


def main(rounds: int = 3, steps: int = 8) -> None:
    """Run the benchmark.

    Args:
        rounds: Processes of each kind.
        steps: Steps of each process; the first two do not count.
    """
    print("| dtype | sequences | memory | seconds a step | ratio | peak, MB |")
    print("|---|---|---|---|---|---|")
    for precision, batch in SHAPES:
        seconds: dict[str, list[float]] = {"given back": [], "kept": []}
        peaks: dict[str, list[float]] = {"given back": [], "kept": []}
        for _ in range(rounds):
            for name in seconds:
                asked = [sys.executable, __file__, "one", precision, str(batch), name, str(steps)]
                done = subprocess.run(asked, capture_output=True, text=True, check=True)
                found, peak = json.loads(done.stdout.splitlines()[-1])
                seconds[name] += found
                peaks[name].append(peak)
        first = statistics.median(seconds["given back"])
        for name, found in seconds.items():
            median = statistics.median(found)
            print(
                f"| {precision} | {batch} | {name} | {median:.2f} | {median / first:.2f} | "
                f"{statistics.median(peaks[name]):,.0f} |",
                flush=True,
            )
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads of {cpu}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        _, _, precision, batch, name, steps = sys.argv
        measure(precision, int(batch), name == "kept", int(steps))
    else:
        tyro.cli(main)
