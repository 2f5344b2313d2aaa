"""Exact where you ask, on SmolLM2-135M: what each norm costs, a question's price, and how fast.

    make smollm2
    python benchmarks/english_text.py text.jsonl
    python benchmarks/smollm2_local.py text.jsonl [--only costs prices speed]
    python benchmarks/smollm2_local.py text.jsonl --only prices --questions logits --steps 50

Untrained constants are measured on 32 sequences of 256 tokens, prices on 20,480 tokens of other
documents. `--steps` adds a row with so many steps of distillation, 512 tokens each. Seconds are
medians of 5 in float32, in units of one forward pass over the same prompt; memory is what a call
added to the resident set at its peak.
"""

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from resident_memory import forget_peak, resident
from transformer_lens import HookedTransformer
from tyro.conf import Positional

import lnfree_interp as lf

PROMPT = "When Mary and John went to the store, John gave a drink to"
TARGET = lf.LogitDifference(" Mary", " John")
LENGTH = 256
QUESTIONS: dict[str, Any] = {
    "logits": TARGET,
    "L23H3": lf.Score(23, 3),
    "L20N7": lf.Neuron(20, 7),
    "paths": lambda trace: lf.expand_paths(trace, " Mary", " John"),
}
Part = Literal["costs", "prices", "speed"]
Question = Literal["logits", "L23H3", "L20N7", "paths"]
"""Direct logit attribution, the scores of a head, the input of a neuron, a logit's paths."""


def read(model: HookedTransformer, file: Path, sequences: int, skip: int) -> torch.Tensor:
    """Sequences from all over 400 documents after the first `skip`, each after the
    beginning-of-text token."""
    lines = file.read_text(encoding="utf-8").splitlines()[skip : skip + 400]
    texts = [json.loads(line)["text"] for line in lines]
    tokens = lf.pack(texts, model.tokenizer, LENGTH, prepend_bos=True)
    return tokens[torch.arange(sequences) * len(tokens) // sequences]


def costs(model: HookedTransformer, file: Path) -> None:
    """What each norm costs."""
    began = time.perf_counter()
    found = lf.site_sensitivity(model, read(model, file, 8, 0))
    print(f"\n{time.perf_counter() - began:.0f} s: {found}\n")
    print(found.to_frame().round(3).to_string(index=False))


def prices(
    model: HookedTransformer, file: Path, steps: int, questions: tuple[Question, ...]
) -> None:
    """What making a question exact costs, and how exact it is."""
    text, heldout = read(model, file, 128, 3000), read(model, file, 80, 1000)
    print("\n| question | frozen | steps | nats added | KL | top-1 agreement | error |")
    print("|---|---|---|---|---|---|---|")
    for name in questions:
        question = QUESTIONS[name]
        for trained in (0, *([steps] if steps and question is TARGET else [])):
            began = time.perf_counter()
            frozen = lf.freeze_for(model, question, text, trained, heldout=heldout, progress=False)
            seconds = time.perf_counter() - began
            price, sites = frozen.price, len(frozen.sites)
            errors = [relative_error(frozen.model, question)]
            if question is TARGET:
                errors.append(relative_error(in_float64(frozen.model), question))
            shown = ", ".join(f"{error:.1e}" for error in errors)
            print(
                f"| {name} | {sites} of 91 | {trained} ({seconds:.0f} s) | {price.added:+.4f} | "
                f"{price.divergence:.4f} | {price.agreement:.1%} | {shown} |",
                flush=True,
            )
            if question is TARGET:
                two = lf.direct_effect_additivity(
                    in_float64(frozen.model), heldout[:2], ["L23H3"], ["L29H1"]
                )
                print(f"|  | effects of L23H3 and L29H1 together, float64 | | | | | {two} |")


def in_float64(model: HookedTransformer) -> HookedTransformer:
    """A copy in double precision."""
    return lf.with_norm_sites(model).to(torch.float64)


def relative_error(model: HookedTransformer, question: Any) -> float:
    """The measured error of the answer, once it is verified."""
    trace = lf.trace(model, PROMPT, prepend_bos=False)
    asked = trace.attribute(question) if isinstance(question, lf.Target) else question(trace)
    return asked.verify().error.relative


def speed(model: HookedTransformer) -> None:
    """Seconds of the analyses in forward passes, and their memory."""
    calls: dict[str, Callable[[lf.Trace], Any]] = {
        "attribution by head": lambda trace: trace.attribute(TARGET, "head"),
        "attribution by source": lambda trace: trace.attribute(TARGET, "source"),
        "attribution by neuron": lambda trace: trace.attribute(TARGET, "neuron"),
        "scores of L23H3": lambda trace: lf.attribute_scores(trace, 23, 3),
        "paths": lambda trace: lf.expand_paths(trace, " Mary", " John"),
        "flow graph": lambda trace: lf.flow_graph(trace, " Mary", " John"),
    }
    tokens = model.to_tokens(PROMPT, prepend_bos=False)
    forward, _ = measured(lambda: model(tokens))
    print(f"\none forward pass over {tokens.shape[1]} tokens: {forward:.3f} s\n")
    print("| question, its own forward pass included | seconds | forward passes | peak, MB |")
    print("|---|---|---|---|")
    for name, ask in calls.items():
        seconds, peak = measured(
            lambda ask=ask: ask(lf.trace(model, PROMPT, prepend_bos=False, hold=True, keep="asked"))
        )
        print(f"| {name} | {seconds:.2f} | {seconds / forward:.1f} | {peak:,.0f} |")


def measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of five calls, and the memory that one more adds at its peak, in MB."""
    with torch.no_grad():
        call()
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        gc.collect()
        forget_peak()
        before = resident("VmRSS")
        call()
    return statistics.median(seconds), resident("VmHWM") - before


def main(
    text: Positional[Path],
    steps: int = 0,
    only: tuple[Part, ...] = ("costs", "prices", "speed"),
    questions: tuple[Question, ...] = ("logits", "L23H3", "L20N7", "paths"),
) -> None:
    """Measure and print.

    Args:
        text: From `english_text.py`.
        steps: Steps of distillation after `ln_final` is frozen; 0: none.
        only: What to measure.
        questions: Whose prices.
    """
    model = lf.load(lf.smollm2())
    if "speed" in only:
        speed(model)
    if "prices" in only:
        prices(model, text, steps, questions)
    if "costs" in only:
        costs(model, text)
    cores = torch.get_num_threads()
    print(f"\ntorch {torch.__version__}, {cores} threads of {platform.processor() or 'a CPU'}")


if __name__ == "__main__":
    tyro.cli(main)
