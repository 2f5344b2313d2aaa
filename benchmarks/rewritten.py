"""What removal rewrote, in the bundled model beside the same fine-tuning without it.

    python benchmarks/rewritten.py
    python benchmarks/rewritten.py --before MODEL.gguf --after run/model

`recipes.distilled` against its vanilla control: the same steps, text and learning rates. The norm
of the change over the norm of the parameters before, by kind of component and layer, and the
components that changed most. With `--after`, the same for finished runs of another model, as their
folders have it.
"""

import platform
from collections.abc import Sequence
from typing import Any

import torch
import tyro

import lnfree_interp as lf

LENGTH = 256
MOST = 10
"""How many layers a table has."""


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def bundled(steps: int, seed: int) -> dict[str, lf.ComponentChange]:
    """Both runs on the bundled model."""
    model = lf.load(lf.bundled_checkpoint(), device="cpu")
    text = lf.pack(lf.stdlib_corpus("train"), model.tokenizer, LENGTH)
    recipe = lf.recipes.distilled(model, steps=steps, seed=seed)
    print(f"{steps} steps of {recipe.batch * LENGTH} tokens, seed {seed}\n")
    return {
        name: lf.component_change(model, lf.remove_norms(model, one, text, log_every=0).model)
        for name, one in (("LN-free", recipe), ("vanilla", recipe.vanilla()))
    }


def finished(before: str, after: Sequence[str]) -> dict[str, lf.ComponentChange]:
    """Runs that there are, by their folders' names."""
    model = lf.load(before, device="cpu", check=False)
    return {
        name: lf.component_change(model, lf.load(name, device="cpu", check=False)) for name in after
    }


def main(
    steps: int = 250,
    seed: int = 0,
    top: int = 10,
    before: str | None = None,
    after: tuple[str, ...] = (),
) -> None:
    """Print the tables.

    Args:
        steps: Steps of the recipe.
        seed: The random seed of the order of the text.
        top: How many components to name.
        before: The model that finished runs began with.
        after: Models of finished runs, unfolded; a run of which norms stayed live is written so.
            Default: the bundled model is trained.
    """
    if (before is None) != (not after):
        raise SystemExit("--before and --after belong together: give both, or neither")
    changes = finished(before, after) if before is not None else bundled(steps, seed)
    found = {name: change.by_layer() for name, change in changes.items()}
    first = next(iter(found))
    layers = sorted({n for kind in found[first].values() for n in kind if n is not None})
    shown = layers if len(layers) <= MOST else layers[:: -(-len(layers) // MOST)]
    rows = []
    for kind, by_layer in found[first].items():
        for name in changes:
            values = [found[name][kind][layer] for layer in by_layer if layer in (None, *shown)]
            cells = [f"{100 * x:.1f} %" for x in values]
            rows.append([kind, name, *cells, *[""] * (len(shown) - len(cells))])
    print(table(["kind", "run", *(f"layer {layer}" for layer in shown)], rows))
    frames = {name: change.to_frame().set_index("component") for name, change in changes.items()}
    most = changes[first].top(top).component
    print(f"\nThe {top} that the first run changed most:\n")
    print(table(
        ["component", *changes],
        [[name, *(f"{100 * frame.loc[name].relative:.1f} %" for frame in frames.values())]
         for name in most],
    ))  # fmt: skip
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads of {cpu}")


if __name__ == "__main__":
    tyro.cli(main)
