"""What removal rewrote in the bundled model, beside the same fine-tuning without it.

    python benchmarks/rewritten.py

`recipes.distilled` against its vanilla control: the same steps, text and learning rates. The norm
of the change over the norm of the parameters before, by kind of component and layer, and the
components that changed most.
"""

import platform
from typing import Any

import torch
import tyro

import lnfree_interp as lf

LENGTH = 256


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(steps: int = 250, seed: int = 0, top: int = 10) -> None:
    """Run both, and print the tables.

    Args:
        steps: Steps of the recipe.
        seed: The random seed of the order of the text.
        top: How many components to name.
    """
    model = lf.load(lf.bundled_checkpoint(), device="cpu")
    text = lf.pack(lf.stdlib_corpus("train"), model.tokenizer, LENGTH)
    recipe = lf.recipes.distilled(model, steps=steps, seed=seed)
    changes = {
        name: lf.component_change(model, lf.remove_norms(model, one, text, log_every=0).model)
        for name, one in (("LN-free", recipe), ("vanilla", recipe.vanilla()))
    }
    found = {name: change.by_layer() for name, change in changes.items()}
    layers = range(model.cfg.n_layers)
    rows = []
    for kind, by_layer in found["LN-free"].items():
        for name in changes:
            values = [found[name][kind][layer] for layer in by_layer]
            cells = [f"{100 * x:.1f} %" for x in values]
            rows.append([kind, name, *cells, *[""] * (len(layers) - len(cells))])
    print(table(["kind", "run", *(f"layer {layer}" for layer in layers)], rows))
    frames = {name: change.to_frame().set_index("component") for name, change in changes.items()}
    most = changes["LN-free"].top(top).component
    print(f"\nThe {top} that removal changed most:\n")
    print(table(
        ["component", *changes],
        [[name, *(f"{100 * frame.loc[name].relative:.1f} %" for frame in frames.values())]
         for name in most],
    ))  # fmt: skip
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    print(
        f"\n{steps} steps of {recipe.batch * LENGTH} tokens, seed {seed}; torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads of {cpu}"
    )


if __name__ == "__main__":
    tyro.cli(main)
