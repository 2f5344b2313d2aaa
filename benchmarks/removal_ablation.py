"""What each part of the recipe `measured` brings: the recipe without it, at equal tokens.

    python benchmarks/removal_ablation.py rows.jsonl [--seeds 0 1 2] [--only measured distilled]
    make smollm2 && python benchmarks/english_text.py text.jsonl
    python benchmarks/removal_ablation.py slow.jsonl --smollm2 text.jsonl --tokens 122880 --seeds 0

The first is about the bundled model and Python source, the second about SmolLM2-135M and English,
in sequences of 256 tokens (SmolLM2: behind a beginning-of-text token, and one sequence a step).
Loss and KL divergence from the original are in nats per token on held-out text; p99.9 is a quantile
of the tokens' losses. A sequence on which a token overflows is left out of all but the count, and
of the median of sequences, where it is the worst. The KL divergence of training sequences is the
median of the last tenth of the steps, under the cap if there is one: it tells runs apart in which
tokens overflow. Of random tokens that repeat, the share of 100 prompts whose likeliest next token
is right. A run that diverged has the step at which it did. All rows see as many tokens. Each
finished run is a line of `rows.jsonl`, and runs that are there are not run again, so that the
benchmark can be stopped and continued.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from smollm2_removed import recall, repetitions
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers.utils import logging

import lnfree_interp as lf
from lnfree_interp.errors import TrainingError
from lnfree_interp.evaluation.text_pass import measure_text
from lnfree_interp.removal.costs_file import read_costs, write_costs
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import extremes, published_order

LENGTH = 256
OWN_TEXT = "text that the model wrote"
Change = Callable[[Recipe], Recipe]


def losses(recipe: Recipe, **weights: float) -> Recipe:
    """The recipe with some terms of the loss at other weights."""
    return replace(recipe, losses={**recipe.losses, **weights})


def published(recipe: Recipe) -> Recipe:
    """The published order in the same time, each site fading as long."""
    first = min(event.step for event in recipe.events)
    sites = [event.site for event in recipe.events]
    fade = min(event.over for event in recipe.events)
    over = max(event.end for event in recipe.events) - first - fade
    events = published_order(sites, start=0, ln2_gap=2, qk_gap=2, v_gap=3)
    scale = over / max(event.step for event in events)
    return replace(
        recipe,
        events=tuple(
            replace(event, step=first + int(event.step * scale), over=fade) for event in events
        ),
    )


def at_once(recipe: Recipe) -> Recipe:
    """Sites frozen at the end of their fading, at one step."""
    return replace(recipe, events=tuple(replace(e, step=e.end, over=0) for e in recipe.events))


def special(recipe: Recipe, **settings: object) -> Recipe:
    """The recipe with other settings of special tokens."""
    return replace(recipe, special=replace(recipe.special, **settings))


def sigma(recipe: Recipe, **settings: object) -> Recipe:
    """The recipe with another way to measure sigma."""
    return replace(recipe, statistics=replace(recipe.statistics, **settings))


QUICK: dict[str, Change] = {
    "measured": lambda recipe: recipe,
    "no scale anchor": lambda recipe: replace(recipe, scale_anchor=0.0),
}
"""Changes of the recipe for ordinary activations."""

SETTINGS = ((8, 4e-4, 0.1), (8, 6e-4, 0.3), (8, 8e-4, 0.1), (4, 4e-4, 0.5), (4, 4e-4, 0.1),
            (4, 3e-4, 0.1))  # fmt: skip
"""Other sequences a step, peak learning rates, and shares of it at the end, on the way from
`distilled` to that recipe."""

SLOW: dict[str, Change] = {
    "measured": lambda recipe: recipe,
    "published order": published,
    "no fading": at_once,
    "the cap goes at the end": lambda recipe: special(recipe, outliers_stay=False),
    "no cap": lambda recipe: special(recipe, outliers_from=0, outliers_until=None),
    "sigma follows until the cap is gone": lambda recipe: sigma(recipe, follow_frozen=True),
    "sigma of few sequences": lambda recipe: sigma(recipe, momentum=0.9),
    "sigma of all tokens": lambda recipe: sigma(recipe, tokens="all"),
    "no target in the stream": lambda recipe: losses(recipe, stream=0.0),
    "the term on scales at its full weight from the start": lambda recipe: losses(
        recipe, scales=extremes(recipe.losses["scales"])[1]
    ),
    "no term on scales": lambda recipe: losses(recipe, scales=0.0),
    "weights of the last step": lambda recipe: replace(recipe, weight_average=0.0),
    "no repeated tokens": lambda recipe: replace(recipe, repeats=0.0),
    "no random tokens": lambda recipe: replace(recipe, random_tokens=0.0),
    "embeddings as they are": lambda recipe: replace(recipe, embedding_cap=0.0),
    "first tokens keep a constant": lambda recipe: special(recipe, keep_first=True),
    "no gradient thrown away": lambda recipe: replace(
        recipe, guard=replace(recipe.guard, spike=None)
    ),
    "never waits": lambda recipe: replace(recipe, wait=None),
    "twice the learning rate": lambda recipe: replace(recipe, lr=2 * recipe.lr),
}
"""Changes of the recipe for massive activations."""


COLUMNS = (
    "recipe", "seeds", "loss", "KL from the original", "median of sequences",
    "of training sequences at the end", "p99.9", "sequences without overflow",
    "random tokens that repeat, of the text / of the vocabulary", "gradients thrown away",
    "diverged",
)  # fmt: skip


def material(smollm2: Path | None) -> tuple[HookedTransformer, Tensor, Tensor]:
    """The model, its training text and held-out text."""
    logging.disable_progress_bar()
    if smollm2 is None:
        model = lf.load(lf.bundled_checkpoint(), device="cpu")
        train, heldout = (
            lf.pack(lf.stdlib_corpus(split), model.tokenizer, LENGTH)
            for split in ("train", "heldout")
        )
        return model, train, heldout[::3]
    model = lf.load(lf.smollm2(), device="cpu")
    texts = [json.loads(line)["text"] for line in smollm2.read_text(encoding="utf-8").splitlines()]
    train, heldout = (
        lf.pack(some, model.tokenizer, LENGTH, prepend_bos=True)
        for some in (texts[:400], texts[-400:])
    )
    return model, train, heldout[:: len(heldout) // 32]


def outcome(
    model: HookedTransformer, recipe: Recipe, text: Tensor, heldout: Tensor
) -> dict[str, Any]:
    """What a run makes of the model, on held-out text."""
    began = time.perf_counter()
    try:
        run = lf.remove_norms(model, recipe, text, progress=False, log_every=0)
    except TrainingError as error:
        return {"diverged": str(error)}
    after = measure_text({"original": model, "run": run.model}, heldout, "original")["run"]
    assert after.kl is not None
    records = run.history[-max(1, len(run.history) // 10) :]
    last = [record.losses["distillation"] for record in records if recipe.always_distils]
    finite = after.kl.isfinite().all(dim=1)
    loss, kl = after.loss[finite].double(), after.kl[finite].double()
    seen, every_token = heldout[:, 1:].flatten(), torch.arange(1000, model.cfg.d_vocab)
    by_sequence = after.kl.double().mean(dim=1).nan_to_num(float("inf"), float("inf"))
    return {
        "loss": loss.mean().item(), "kl": kl.mean().item(),
        "kl_median": by_sequence.median().item(),  # one that overflows counts as the worst
        "kl_training": statistics.median(last) if last else float("nan"),
        "tail": loss.flatten().quantile(0.999).item() if len(loss) else float("nan"),
        "finite": int(finite.sum()), "sequences": len(finite),
        "skipped": sum(record.skipped for record in run.history),
        "repeated": [recall(run.model, repetitions(model, pool)) for pool in (seen, every_token)],
        "minutes": (time.perf_counter() - began) / 60,
    }  # fmt: skip


def main(
    rows: tyro.conf.Positional[Path],
    seeds: tuple[int, ...] = (0, 1, 2),
    tokens: int = 163_840,
    smollm2: Path | None = None,
    only: tuple[str, ...] = (),
) -> None:
    """Run the benchmark.

    Args:
        rows: The file of finished runs; it is made if it does not exist.
        seeds: Random seeds of the order of the text.
        tokens: Tokens of every run.
        smollm2: Text from `english_text.py`: take SmolLM2-135M instead of the bundled model.
        only: The rows to run, by name.
    """
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    model, train, heldout = material(smollm2)
    kept = rows.with_suffix(".costs.json")
    if kept.exists():
        costs = read_costs(str(kept), model)
    else:
        costs = lf.site_sensitivity(model, train[:8], progress=False)
        write_costs(str(kept), model, costs)
    print(costs)
    made = lf.recipes.measured(costs)
    slow = made.wait is not None

    def steps(batch: int) -> int:
        return tokens // (batch * LENGTH)

    def measured(seed: int, batch: int = 1 if slow else made.batch) -> Recipe:
        recipe = lf.recipes.measured(costs, steps=steps(batch), seed=seed)
        return replace(recipe, batch=batch, micro_batch=min(batch, 4))

    recipes: dict[str, Callable[[int], Recipe]] = {
        name: lambda seed, change=change: change(measured(seed))
        for name, change in (SLOW if slow else QUICK).items()
    }
    for batch, lr, final in () if slow else SETTINGS:
        recipes[f"{batch} sequences, {lr:g} to {final:g}"] = (
            lambda seed, batch=batch, lr=lr, final=final: replace(
                measured(seed, batch), lr=lr, final_lr=final
            )
        )

    def distilled(seed: int) -> Recipe:
        return lf.recipes.distilled(model, steps=steps(8), seed=seed)

    recipes |= {
        "distilled": distilled,
        "distilled, targets in the stream": lambda seed: losses(distilled(seed), stream=1.0),
        "distilled, three times these": lambda seed: losses(distilled(seed), stream=3.0),
        "control": lambda seed: measured(seed).vanilla(),
        OWN_TEXT: measured,
    }
    own = None
    for name in only or recipes:
        for seed in seeds:
            about = {"name": name, "seed": seed, "tokens": tokens}
            if any(about.items() <= row.items() for row in done):
                continue
            if name == OWN_TEXT and own is None:
                own = lf.sample_text(model, tokens // LENGTH, LENGTH, progress=False)
            text = own if name == OWN_TEXT and own is not None else train
            row = about | outcome(model, recipes[name](seed), text, heldout)
            done.append(row)
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in recipes:
        if of := [row for row in done if (row["name"], row["tokens"]) == (name, tokens)]:
            print(_row(name, of))
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    print(
        f"\n{tokens:,} tokens a run, {LENGTH} a sequence; {heldout.numel():,} held-out tokens; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {cpu}"
    )


def _row(name: str, runs: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, and their standard deviation."""
    ended = [run for run in runs if "diverged" not in run]
    lost = [run["diverged"].partition(":")[0].rpartition(" ")[2] for run in runs
            if "diverged" in run]  # fmt: skip

    def cell(key: str, digits: int = 4) -> str:
        values = [run[key] for run in ended if math.isfinite(run[key])]
        if not values:
            return "not finite" if ended else ""
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        lost = f" ({len(ended) - len(values)} not finite)" if len(values) < len(ended) else ""
        return f"{statistics.mean(values):.{digits}f}{spread}{lost}"

    finite = ", ".join(f"{run['finite']} of {run['sequences']}" for run in ended)
    repeated = [statistics.mean(shares) for shares in zip(*(run["repeated"] for run in ended),
                                                                strict=True)]  # fmt: skip
    skipped = ", ".join(str(run["skipped"]) for run in ended)
    cells = [
        name, str(len(runs)), cell("loss"), cell("kl"), cell("kl_median"),
        cell("kl_training"), cell("tail", 2), finite,
        " / ".join(f"{share:.2f}" for share in repeated), skipped,
        ", ".join(f"at step {step}" for step in lost),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    tyro.cli(main)
