"""Architectures that vary their norms, trained alike: loss, depth, gradients, and what the removal
of all their norms costs.

    python benchmarks/norm_variants.py rows.jsonl [--depths 4 16] [--seeds 0 1 2] [--only Pre-LN]
    python benchmarks/norm_variants.py rows.jsonl --print

Models of width 64 are trained from scratch on the standard library's source, with equal tokens and
a d_mlp that makes their numbers of parameters equal within 0.5 %. Sub-LN with Magneto's
initialisation and LayerNorm Scaling start from weights that do not shrink with depth, as in their
papers. Each is trained at its own best learning rate: the one of `--rates` with the lowest loss on
text that is neither trained nor held out, with the first seed, at each depth. Then every norm of
each is removed (`taper`: all sites at once and as slowly, however many there are), and its control
has the same steps, text and rates, and the same loss but for the taper's term on the scale of the
stream.
Each finished row is a line of `rows.jsonl`; rows that are there are not run again, so that the
benchmark can be stopped and continued. `--print`, with the same sizes, makes the tables of what
there is. How fast they are: `norm_speed.py`.
"""

import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers.utils import logging

import lnfree_interp as lf
from lnfree_interp.removal.statistics import measure_sigma

WIDTH, HEADS, LENGTH = 64, 4, 128
Make = Callable[[HookedTransformer, Tensor], HookedTransformer]


def ln_free(model: HookedTransformer, tokens: Tensor) -> HookedTransformer:
    """Norms that divide by a constant from the first step on, their inputs' initial scale."""
    sited = lf.with_norm_sites(model)
    sites = lf.list_norm_sites(sited)
    for site, sigma in measure_sigma(sited, sites, tokens).items():
        lf.freeze_site(sited, site, sigma)
    return sited


ARCHITECTURES: dict[str, Make] = {
    "Pre-LN": lambda model, _: lf.with_norm_sites(model),
    "RMSNorm": lambda model, _: lf.to_map(model, "RMSNorm", bias=False).model,
    "CRMSNorm": lambda model, _: lf.to_map(model, "CRMSNorm", bias=False).model,
    "Peri-LN": lambda model, _: lf.to_peri_ln(model).model,
    "NormFormer": lambda model, _: lf.to_normformer(model).model,
    "Sub-LN": lambda model, _: lf.to_sub_ln(model).model,
    "Sub-LN, Magneto's initialisation": lambda model, _: lf.to_sub_ln(model, initialise=True).model,
    "LayerNorm Scaling": lambda model, _: lf.to_layernorm_scaling(model, keep_function=False).model,
    "DyT": lambda model, _: lf.to_dyt(model).model,
    "DyT, alpha from the text": lambda model, tokens: lf.to_dyt(model, tokens=tokens).model,
    "LN-free from the start": ln_free,
}
UNSCALED = ("Sub-LN, Magneto's initialisation", "LayerNorm Scaling")
"""Those whose W_O and W_out start as large as other weights."""


def count(model: HookedTransformer) -> int:
    """Parameters, a tied unembedding once."""
    return sum(W.numel() for W in lf.with_norm_sites(model, copy_weights=False).parameters())


def matched(name: str, like: HookedTransformer, tokens: Tensor, depth: int, seed: int) -> Any:
    """A new model of an architecture with as many parameters as Pre-LN has, nearly."""
    make = ARCHITECTURES[name]

    def new(d_mlp: int) -> HookedTransformer:
        small = lf.untrained(
            like, n_layers=depth, d_model=WIDTH, n_heads=HEADS, d_mlp=d_mlp, n_ctx=LENGTH,
            seed=seed, scaled=name not in UNSCALED,
        )  # fmt: skip
        return make(small, tokens)

    model = new(4 * WIDTH)
    wanted = count(ARCHITECTURES["Pre-LN"](
        lf.untrained(like, n_layers=depth, d_model=WIDTH, n_heads=HEADS, n_ctx=LENGTH), tokens
    ))  # fmt: skip
    unit = count(new(4 * WIDTH + 1)) - count(model)
    more = round((wanted - count(model)) / unit)
    model = new(4 * WIDTH + more) if more else model
    assert abs(count(model) / wanted - 1) < 0.005
    return model


def measured(
    name: str, depth: int, seed: int, like: HookedTransformer, train: Tensor, heldout: Tensor,
    sizes: Sequence[int], lr: float,
) -> dict[str, Any]:  # fmt: skip
    """A row: an architecture at a depth, with a seed."""
    steps, removal, batch = sizes
    model = matched(name, like, train[:16], depth, seed)
    recipe = replace(lf.recipes.from_scratch(steps=steps, batch=batch, seed=seed), lr=lr)
    began = time.perf_counter()
    row: dict[str, Any] = {
        "name": name, "depth": depth, "seed": seed, "parameters": count(model),
        "sizes": list(sizes), "lr": lr, "diverged": [],
    }  # fmt: skip
    try:
        run = lf.train(model, recipe, train, progress=False)
    except lf.errors.TrainingError as error:
        minutes = (time.perf_counter() - began) / 60
        return row | {"loss": math.nan, "diverged": [f"training: {error}"], "minutes": minutes}
    report = lf.depth_report(run.model, heldout[:32], eigenvalues=4, progress=False)
    balance = lf.GradientBalance.of_run(run, from_step=steps // 2)
    row |= {
        "loss": lf.evaluate_loss(run.model, heldout).mean,
        "variance": report.variance.tolist(), "angle": report.angles.diagonal(1).tolist(),
        "jacobian_distance": report.jacobian_distance.tolist(),
        "spectral_radius": report.spectral_radius.tolist(),
        "loss_without": report.loss_without.tolist(),
        "gradients": {kind: sizes.tolist() for kind, sizes in balance.by_kind.items()},
    }  # fmt: skip
    if lf.live_sites(run.model):
        taper = lf.recipes.tapered(run.model, steps=removal, seed=seed)
        for what, this in (("free", taper), ("control", taper.vanilla())):
            try:
                after = lf.remove_norms(run.model, this, train, progress=False, log_every=0)
                row[what] = lf.evaluate_loss(after.model, heldout).mean
            except lf.errors.TrainingError as error:
                row[what] = math.nan
                row["diverged"].append(f"{what}: {error}")
    row["minutes"] = (time.perf_counter() - began) / 60
    return row


def losses_at(
    rates: Sequence[float], name: str, depth: int, seed: int, like: HookedTransformer,
    train: Tensor, validation: Tensor, sizes: Sequence[int],
) -> dict[str, float]:  # fmt: skip
    """The loss on the validation text after training at each rate; not a number where it
    diverged."""
    steps, _, batch = sizes
    found = {}
    for lr in rates:
        recipe = replace(lf.recipes.from_scratch(steps=steps, batch=batch, seed=seed), lr=lr)
        model = matched(name, like, train[:16], depth, seed)
        try:
            run = lf.train(model, recipe, train, progress=False, log_every=0)
            found[f"{lr:g}"] = lf.evaluate_loss(run.model, validation).mean
        except lf.errors.TrainingError:
            found[f"{lr:g}"] = math.nan
    return found


def best(losses: dict[str, float]) -> float:
    """The rate of the lowest loss."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return float(min(finite or losses, key=losses.__getitem__))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The tables of the rows that there are, by depth."""
    for depth in sorted({row["depth"] for row in rows}):
        here = [row for row in rows if row["depth"] == depth]
        n = len({row["seed"] for row in here})
        print(f"\n{depth} layers, {here[0]['parameters']:,} parameters, {n} seeds\n")
        print("| architecture | rate | held-out loss | LN-free minus control | variance, last "
              "over first block | angle of a block, median | norm of J - I, median | without the "
              "least needed block | gradient of W_out, first over last layer |")  # fmt: skip
        print("|" + "---|" * 9)
        for name in ARCHITECTURES:
            if not (of := [row for row in here if row["name"] == name]):
                continue
            lost = [row for row in of if not math.isfinite(row["loss"])]
            if len(lost) == len(of):
                print(f"| {name} | {lost[0]['lr']:g} | diverged |{' |' * 6}")
                continue
            of = [row for row in of if row not in lost]
            price = [row["free"] - row["control"] for row in of if "free" in row]
            cells = [
                f"{of[0]['lr']:g}",
                spread([row["loss"] for row in (*of, *lost)], ".3f"),
                spread(price, "+.3f") if price else "no norm",
                spread([row["variance"][-1] / row["variance"][1] for row in of], ".3g", False),
                spread([statistics.median(row["angle"]) for row in of], ".3f", False),
                spread([statistics.median(row["jacobian_distance"]) for row in of], ".3f", False),
                spread([min(row["loss_without"]) for row in of], "+.3f", False),
                spread([first_over_last(row["gradients"]["mlp.W_out"]) for row in of],
                       ".2f", False, "no gradient"),
            ]  # fmt: skip
            print(f"| {name} | {' | '.join(cells)} |")


def first_over_last(sizes: Sequence[float]) -> float:
    """Of layers; not a number if no gradient arrives."""
    return sizes[0] / sizes[-1] if sizes[-1] else math.nan


def spread(
    values: Sequence[float], form: str, deviation: bool = True, none: str = "diverged"
) -> str:
    """The mean over seeds, and their standard deviation."""
    good = [x for x in values if math.isfinite(x)]
    if not good:
        return none
    lost = f" ({len(values) - len(good)} diverged)" if len(good) < len(values) else ""
    more = f" ± {statistics.stdev(good):.3f}" if deviation and len(good) > 1 else ""
    return f"{statistics.mean(good):{form}}{more}{lost}"


def main(
    rows: tyro.conf.Positional[Path],
    depths: tuple[int, ...] = (4, 16),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 200,
    removal: int = 120,
    batch: int = 16,
    rates: tuple[float, ...] = (1.25e-4, 5e-4, 2e-3, 8e-3),
    only: tuple[str, ...] = (),
    print_only: Annotated[bool, tyro.conf.arg(name="print")] = False,
) -> None:
    """Run the benchmark.

    Args:
        rows: The file of finished rows; it is made if it does not exist.
        depths: Numbers of layers.
        seeds: Seeds of weights and of the order of the text.
        steps: Steps of training.
        removal: Steps of the removal and of its control.
        batch: Sequences of 128 tokens in a step of training; the removal has 16.
        rates: Peak learning rates of training, of which each architecture gets its best.
        only: Architectures, by name. Default: all.
        print_only: Run nothing: print the tables of the rows that there are.
    """
    sizes = [steps, removal, batch]
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []

    def add(row: dict[str, Any]) -> dict[str, Any]:
        done.append(row)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def find(**about: Any) -> dict[str, Any] | None:
        about |= {"sizes": sizes}
        here = (row for row in done if about.items() <= row.items())
        return next(here, None)

    if not print_only:
        logging.disable_progress_bar()
        like = lf.load(lf.bundled_checkpoint(), device="cpu")
        train, heldout = (
            lf.pack(lf.stdlib_corpus(split), like.tokenizer, LENGTH)
            for split in ("train", "heldout")
        )
        heldout = heldout[:: max(1, len(heldout) // 256)][:256]
        train, validation = train[:-128], train[-128:]
        for depth, seed in itertools.product(depths, seeds):
            for name in only or ARCHITECTURES:
                about = {"name": name, "depth": depth}
                tried = find(rates=list(rates), **about) or add({
                    **about, "rates": list(rates), "sizes": sizes, "losses": losses_at(
                        rates, name, depth, seeds[0], like, train, validation, sizes
                    ),
                })  # fmt: skip
                lr = best(tried["losses"])
                if find(seed=seed, lr=lr, **about) is None:
                    row = add(measured(name, depth, seed, like, train, heldout, sizes, lr))
                    print(f"{name}, {depth} layers, seed {seed}: loss {row['loss']:.3f} at rate "
                          f"{lr:g} of {tried['losses']}, {row['minutes']:.1f} minutes",
                          flush=True)  # fmt: skip
        cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
        print(f"\n{steps * batch * LENGTH:,} tokens of training, {removal * 16 * LENGTH:,} of "
              f"removal; {heldout.numel():,} held-out tokens; torch {torch.__version__}, "
              f"{torch.get_num_threads()} threads of {cpu}")  # fmt: skip
    here = [row for row in done if row["sizes"] == sizes]
    chosen = {(row["name"], row["depth"]): best(row["losses"]) for row in here if "rates" in row}
    show([row for row in here if row.get("lr") == chosen[row["name"], row["depth"]]])


if __name__ == "__main__":
    tyro.cli(main)
