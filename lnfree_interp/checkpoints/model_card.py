"""The README.md of an exported folder: what the model is, how to open it, how exact it is."""

import copy
from typing import Literal

from transformer_lens import HookedTransformerConfig

from lnfree_interp.checkpoints.sidecar import SIDECAR, Sidecar

_WHAT = {
    "live": "a transformer with live norms",
    "partial": "a transformer in which some norms divide by constants: what is read through those "
    "alone is exactly a sum of parts",
    "sites": "a transformer without normalisation: every norm divides by a constant",
    "folded": "a transformer without normalisation: the constant norms are folded into the weights",
    "frozen": "a transformer without normalisation: every norm divides by a constant",
    "rms": "a transformer whose LayerNorms were turned into RMSNorms, exactly",
    "crms": "a transformer whose LayerNorms were turned into CRMSNorms, exactly: its residual "
    "stream has one dimension less",
}


def model_card(
    cfg: HookedTransformerConfig,
    sidecar: Sidecar,
    target: Literal["transformers", "transformer_lens"],
) -> str:
    """The model card as Markdown, with the front matter that the hub reads."""
    lnfree = sidecar.form in ("sites", "folded", "frozen")
    tags = ["mechanistic-interpretability", "transformer-lens"] + ["layernorm-free"] * lnfree
    parts = [
        "\n".join(
            ["---", f"library_name: {target.replace('_', '-')}", "tags:"]
            + [f"- {tag}" for tag in tags]
            + ["---"]
        ),
        f"# {_title(sidecar)}",
        f"This is {_WHAT[sidecar.form]}. {_sizes(cfg)}",
        _opening(target, lnfree),
    ]
    if sidecar.weights is not None:
        parts.append(
            f"**Its weights come from a quantised file** ({sidecar.weights}): they are what the "
            "quantisation left of the original's, and so are its logits."
        )
    if lnfree:
        parts.append(
            "Its residual stream is linear: a logit is exactly the sum of what every head, neuron "
            "and bias contributes."
        )
        if target == "transformers":
            parts.append(
                "transformers has no class without norms, so every norm has an epsilon of 1e12 and "
                "its gain is multiplied by 1e6: it subtracts the mean (LayerNorm) and multiplies "
                "by a constant. Do not replace the norms by identities: gains and biases are in "
                "them. Do not load it in float16, which 1e6 overflows."
            )
    if sidecar.recipe is not None:
        parts += ["## How the norms were removed", _recipe(sidecar)]
    if sidecar.sigma:
        rows = [
            f"| `{name}` | {value:.6g} | {sidecar.sigma_first.get(name, value):.6g} |"
            for name, value in sidecar.sigma.items()
        ]
        head = ["| norm | sigma | sigma of a prompt's first token |", "|---|---|---|"]
        parts += ["## The constant of each norm", "\n".join([*head, *rows])]
    if sidecar.errors:
        rows = [
            f"| {what} | {error['relative']:.1e} | {error['absolute']:.1e} | {error['dtype']} |"
            for what, error in sidecar.errors.items()
        ]
        head = ["| largest logit difference | relative | absolute | dtype |", "|---|---|---|---|"]
        parts += ["## Measured errors", "\n".join([*head, *rows])]
    parts.append(f"`{SIDECAR}` holds these numbers for programs. Written by {sidecar.made_by}.")
    return "\n\n".join(parts) + "\n"


def _title(sidecar: Sidecar) -> str:
    name = (sidecar.source or "model").rstrip("/").rpartition("/")[2]
    kind = {
        "rms": "with RMSNorm", "crms": "with CRMSNorm", "live": "exported",
        "partial": "with some norms frozen",
    }  # fmt: skip
    return f"{name}, {kind.get(sidecar.form, 'without LayerNorm')}"


def _sizes(cfg: HookedTransformerConfig) -> str:
    return (
        f"{cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_heads} heads of {cfg.d_head}, "
        f"vocabulary {cfg.d_vocab}, context {cfg.n_ctx}; architecture {cfg.original_architecture}."
    )


def _opening(target: str, lnfree: bool) -> str:
    lines = ["```python"]
    if target == "transformers":
        lines += [
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            "",
        ]
    lines += ["import lnfree_interp as lf", 'hooked = lf.load("FOLDER")']
    if lnfree:
        lines.append('tools = lf.load("FOLDER", form="frozen")  # for TransformerLens\' own tools')
    return "\n".join([*lines, "```"])


def _recipe(sidecar: Sidecar) -> str:
    recipe = copy.deepcopy(dict(sidecar.recipe or {}))
    events = recipe.pop("events", [])
    for one in (recipe, *recipe.get("release", ())):
        if isinstance(trainable := one.get("trainable"), dict):
            one["trainable"] = f"some entries of {', '.join(trainable['mask'])}"
    technical = ("guard", "sources")
    rows = [f"| {name} | {value} |" for name, value in recipe.items() if name not in technical]
    table = "\n".join(["| field | value |", "|---|---|", *rows])
    if not events:
        return table
    first, last = events[0], events[-1]
    return (
        f"{len(events)} norm sites were frozen one after the other, from `{first[1]}` at step "
        f"{first[0]} to `{last[1]}` at step {last[0]}; fine-tuning went on until step "
        f"{recipe['steps']}.\n\n{table}"
    )
