"""Attribution against the best that TransformerLens' own calls can do: time and memory.

    python benchmarks/attribution.py [--json FILE]

GPT-2 small's shape, random weights, no norms, float32, one prompt; one forward pass is cached and
both sides start from it. Ours is timed with labels, biases and the check that the parts add up;
medians. Memory is the largest resident set above what was there before the call, the result
included. Both results are compared.
"""

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from resident_memory import forget_peak, resident
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer

import lnfree_interp as lf


@dataclass(frozen=True)
class Row:
    """One thing computed one way."""

    what: str
    how: str
    seconds: float
    peak_mb: float
    result_mb: float
    error: float | None = None


def make_model(n_layers: int = 12, n_ctx: int = 1024) -> HookedTransformer:
    """Random weights in GPT-2 small's shape, biases too; folded form."""
    torch.manual_seed(0)
    model = HookedTransformer(
        {
            "n_layers": n_layers, "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072,
            "n_ctx": n_ctx, "d_vocab": 50257, "act_fn": "gelu_new", "normalization_type": None,
            "device": "cpu", "seed": 0,
        }
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name:
                parameter.normal_(std=0.02)
    return model.eval().requires_grad_(False)


def measure(
    what: str, how: str, call: Callable[[], Any], size: Callable[[Any], Tensor], repeats: int
) -> tuple[Row, Any]:
    """Median seconds, and the peak of one more call."""
    call()
    seconds = []
    for _ in range(repeats):
        gc.collect()
        began = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - began)
        del result
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    result = call()
    peak = resident("VmHWM") - before
    values = size(result)
    row = Row(what, how, statistics.median(seconds), peak, values.nbytes / 1e6)
    return row, result


def report(ours: Row, theirs: Row, error: float | None) -> list[Row]:
    """Print both, and their ratios."""
    for row in (theirs, ours):
        print(
            f"| {row.what} | {row.how} | {row.seconds:.3f} | {row.peak_mb:,.0f} "
            f"| {row.result_mb:,.1f} |",
            flush=True,
        )
    said = "" if error is None else f", {error:.1e} apart"
    print(
        f"| | ratio | {theirs.seconds / ours.seconds:.1f} times faster "
        f"| 1/{theirs.peak_mb / max(ours.peak_mb, 0.1):.0f} | {said.lstrip(', ')} |",
        flush=True,
    )
    return [theirs, Row(**(asdict(ours) | {"error": error}))]


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def heads(
    model: HookedTransformer, tokens: Tensor, run: tuple[Tensor, ActivationCache], repeats: int
) -> list[Row]:
    """Every head on the true next token at every position."""
    directions = model.W_U.T[tokens[0, 1:]]

    def stock() -> Tensor:
        run[1].cache_dict = {k: v for k, v in run[1].cache_dict.items() if "hook_result" not in k}
        stack = run[1].stack_head_results()
        return (stack[:, 0, :-1] * directions).sum(-1)

    def ours() -> lf.Contributions:
        return lf.attribute_next_tokens(lf.trace(model, tokens, run=run), by="head").verify()

    def bare() -> list[Tensor]:
        """The products that cannot be left out: every head's output along every direction."""
        found = []
        for layer, block in enumerate(model.blocks):
            z = run[1]["z", layer][0, :-1]
            ahead = directions @ block.attn.W_O.flatten(0, 1).T
            found.append(torch.linalg.vecdot(z, ahead.unflatten(-1, z.shape[1:])))
        return found

    theirs, expected = measure(
        "heads, every position", "stack_head_results, dot", stock, lambda x: x, 1
    )
    least, _ = measure("heads, every position", "bare products", bare, torch.cat, repeats)
    mine, found = measure(
        "heads, every position", "attribute_next_tokens", ours, lambda x: x.values, repeats
    )
    rows = report(mine, theirs, distance(found.of_kind("head")[:, 0], expected))
    print(
        f"| {least.what} | {least.how} | {least.seconds:.3f} | {least.peak_mb:,.0f} "
        f"| {least.result_mb:,.1f} |\n| | ratio | {mine.seconds / least.seconds:.2f} times the "
        "bare products | | |",
        flush=True,
    )
    return [*rows, least]


def neurons(
    model: HookedTransformer, tokens: Tensor, run: tuple[Tensor, ActivationCache], repeats: int
) -> list[Row]:
    """Every head and neuron on the true next token at every position, against bare products."""
    directions = model.W_U.T[tokens[0, 1:]]

    def bare() -> list[Tensor]:
        return [
            directions @ W.T
            for block in model.blocks
            for W in (block.attn.W_O.flatten(0, 1), block.mlp.W_out)
        ]

    def ours() -> lf.Contributions:
        return lf.attribute_next_tokens(lf.trace(model, tokens, run=run), by="neuron").verify()

    def largest(products: list[Tensor]) -> Tensor:
        return torch.cat([x for x in products if x.shape[1] == model.cfg.d_mlp])

    theirs, _ = measure("neurons, every position", "bare products", bare, largest, repeats)
    mine, found = measure(
        "neurons, every position", "attribute_next_tokens", ours, lambda x: x.values, repeats
    )
    layer, some = model.cfg.n_layers // 2, slice(100, 140)
    post = run[1][f"blocks.{layer}.mlp.hook_post"][0, :-1, some]
    expected = post * (directions @ model.W_out[layer][some].T)
    rows = [
        row for row, c in enumerate(found.components)
        if c.kind == "neuron" and c.layer == layer and some.start <= (c.index or 0) < some.stop
    ]  # fmt: skip
    return report(mine, theirs, distance(found.values[rows, 0], expected.T))


def sources(
    model: HookedTransformer, tokens: Tensor, run: tuple[Tensor, ActivationCache], repeats: int
) -> list[Row]:
    """Every head by the token that it reads: ours at all positions, stock at one of them."""
    answer, cache, pos = int(tokens[0, -1]), run[1], tokens.shape[1] - 2

    def stock() -> Tensor:
        found = []
        for layer in range(model.cfg.n_layers):
            v, pattern = cache["v", layer][0], cache["pattern", layer][0, :, pos]
            moved = torch.einsum("shk,hkd->hsd", v, model.W_O[layer])
            found.append((moved * pattern[..., None]) @ model.W_U[:, answer])
        return torch.stack(found).flatten()

    def ours() -> lf.Contributions:
        return lf.attribute_next_tokens(lf.trace(model, tokens, run=run), by="source").verify()

    theirs, expected = measure(
        "heads by source, ONE position", "v W_O, pattern, dot", stock, lambda x: x, repeats
    )
    mine, found = measure(
        "heads by source, every position", "attribute_next_tokens", ours, lambda x: x.values, 1
    )
    rows = torch.tensor([c.kind == "head" for c in found.components])
    b_V = torch.einsum("lhk,lhkd->lhd", model.b_V, model.W_O) @ model.W_U[:, answer]
    patterns = torch.stack([cache["pattern", i][0, :, pos] for i in range(model.cfg.n_layers)])
    whole = found.values[rows, 0, pos] + (b_V[..., None] * patterns).flatten()
    return report(mine, theirs, distance(whole, expected))


def scores(
    model: HookedTransformer, tokens: Tensor, run: tuple[Tensor, ActivationCache], repeats: int
) -> list[Row]:
    """One head's scores from the last position, by pairs of components."""
    layer, head, cache = model.cfg.n_layers - 1, 3, run[1]
    keys = list(range(0, tokens.shape[1], max(1, tokens.shape[1] // 64)))

    def stock() -> Tensor:
        cache.cache_dict = {k: v for k, v in cache.cache_dict.items() if "hook_result" not in k}
        parts = cache.get_full_resid_decomposition(layer, expand_neurons=False)[:, 0]
        q = parts[:, -1] @ model.W_Q[layer, head]
        k = parts[:, keys] @ model.W_K[layer, head]
        return torch.einsum("id,jkd->ijk", q, k) / 8

    def ours() -> lf.ScoreAttribution:
        return lf.attribute_scores(model, tokens[0], layer, head, keys=keys).verify()

    theirs, expected = measure(
        "a score by pairs, 64 keys", "get_full_resid_decomposition (no run)", stock, lambda x: x, 1
    )
    mine, found = measure(
        "a score by pairs, 64 keys", "attribute_scores (with its run)", ours,
        lambda x: x.values, repeats,
    )  # fmt: skip
    at = [i for i, c in enumerate(found.query_components) if c.kind == "head"]
    mine_heads = found.values[at][:, at]
    return report(mine, theirs, distance(mine_heads, expected[: len(at), : len(at)]))


def tables(vocabulary: int = 49152, d_model: int = 576) -> list[Row]:
    """The largest entries of a table over a large vocabulary, against its bare products."""
    cfg = {
        "n_layers": 1, "d_model": d_model, "n_heads": 9, "d_head": 64, "d_mlp": 4, "n_ctx": 8,
        "d_vocab": vocabulary, "act_fn": "gelu", "normalization_type": None, "device": "cpu",
        "seed": 0,
    }  # fmt: skip
    model = HookedTransformer(cfg).requires_grad_(False)
    rows = []
    for name, table in (
        ("bigram_table", lf.bigram_table(model)),
        ("ov_table", lf.ov_table(model, 0, 0)),
    ):

        def bare(table: lf.TokenTable = table) -> Tensor:
            for left in table.left.split(1024):
                product = left @ table.right
            return product

        def ours(table: lf.TokenTable = table) -> Tensor:
            return torch.tensor(table.top(20, progress=False)["value"].tolist())

        theirs, _ = measure(
            f"{name}().top(20), {vocabulary:,} tokens", "bare products", bare, lambda x: x, 1
        )
        mine, _ = measure(f"{name}().top(20), {vocabulary:,} tokens", "top", ours, lambda x: x, 1)
        rows += report(mine, theirs, None)
    return rows


def scaling(repeats: int, n_ctx: int) -> list[Row]:
    """Seconds against length, depth and batch, as a share of one forward pass."""
    rows: list[Row] = []
    print("\n| layers | batch | T | forward, s | heads, s | neurons, s | neurons / forward |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for n_layers, batch, length in (
        (12, 1, n_ctx // 4), (12, 1, n_ctx // 2), (12, 1, n_ctx), (6, 1, n_ctx // 2),
        (12, 2, n_ctx // 4),
    ):  # fmt: skip
        found = scaled(make_model(n_layers, n_ctx), batch, length, repeats)
        rows += found
        forward, by_head, by_neuron = (row.seconds for row in found)
        print(
            f"| {n_layers} | {batch} | {length} | {forward:.2f} | {by_head:.3f} | {by_neuron:.3f} "
            f"| {by_neuron / forward:.3f} |",
            flush=True,
        )
    return rows


def scaled(model: HookedTransformer, batch: int, length: int, repeats: int) -> list[Row]:
    """A forward pass, all heads, all neurons."""
    tokens = torch.randint(50257, (batch, length), generator=torch.Generator().manual_seed(1))
    wanted = ("hook_embed", "hook_pos_embed", "hook_z", "hook_mlp_out", "hook_post")
    run = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(wanted))
    name = f"{model.cfg.n_layers} layers, {batch} x {length}"
    calls: list[tuple[str, Callable[[], Any], Callable[[Any], Tensor]]] = [
        ("forward", lambda: model(tokens), lambda x: x),
        *(
            (
                by,
                lambda by=by: lf.attribute_next_tokens(
                    lf.trace(model, tokens, run=run), by=by
                ).verify(),
                lambda x: x.values,
            )
            for by in ("head", "neuron")
        ),
    ]
    return [measure(name, how, call, size, repeats)[0] for how, call, size in calls]


def streaming(prompts: int) -> None:
    """Memory over many prompts, on the bundled model."""
    model = lf.load(lf.bundled_checkpoint(), device="cpu")
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(model.cfg.d_vocab, (prompts, 64), generator=generator)

    def run(sequences: Tensor) -> None:
        lf.mean_next_token_attribution(model, sequences, by="neuron", hold=True)

    run(text[:40])
    gc.collect()
    forget_peak()
    run(text[:40])
    few = resident("VmHWM")
    run(text)
    print(
        f"\n{prompts} prompts by neuron: peak {resident('VmHWM') - few:+.0f} MB against 40 of them"
    )


@torch.no_grad()
def main(
    length: int = 1024,
    layers: int = 12,
    repeats: int = 5,
    prompts: int = 1000,
    out: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Run the benchmark.

    Args:
        length: Tokens of the prompt.
        layers: Of the model.
        repeats: Calls whose median counts.
        prompts: Of the streaming test.
        out: Also write the rows there.
    """
    model = make_model(layers, length)
    tokens = torch.randint(50257, (1, length), generator=torch.Generator().manual_seed(1))
    run = model.run_with_cache(tokens)
    print("| what | how | seconds | peak, MB | result, MB |\n|---|---|---|---|---|", flush=True)
    rows = []
    for part in (heads, neurons, sources, scores):
        rows += part(model, tokens, run, repeats)
    del run, model
    rows += tables()
    rows += scaling(repeats, length)
    streaming(prompts)
    print(
        f"\nT = {length}, {layers} layers x 768; medians of {repeats}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads of "
        f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}"
    )
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
