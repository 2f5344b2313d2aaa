"""Exported models in transformer-lens 4.x, which cannot share an environment with 3.9.

`make bridge` runs `write` in this project's environment: it exports models, and every number of
every analysis in float64. `read`, in one with transformer-lens 4, opens the exports as
`TransformerBridge`s, asks the same questions and compares.
"""

import json
import sys
from pathlib import Path

import pandas as pd
import torch

import lnfree_interp as lf

TOLERANCE = 1e-10
"""Largest relative error, in float64."""
DISGUISED = 1e-9
"""The same where transformers' LayerNorm stands for a constant: it divides by
sqrt(variance + 1e12), a relative variance / 2e12 apart; 3.9 divides by 1e6."""
TEXT = "def add(self, other):"


# Every analysis, by name: {label: tensor}


def certified(model, hold):
    certificates = lf.certify(model, TEXT, hold=hold)
    return {one.identity: torch.tensor(one.error.relative) for one in certificates}


def analyses(model, hold):
    one = lf.trace(model, TEXT, hold=hold)
    tokens, cfg = one.tokens[0].tolist(), model.cfg
    answer, foil, layer = tokens[-1], tokens[0], cfg.n_layers - 1
    logits = lf.LogitDifference(answer, foil)
    found = {"tokens": {"ids": one.tokens.double()}}
    for by in ("layer", "sublayer", "head", "source", "neuron"):
        found[f"logits by {by}"] = _parts(one.attribute(logits, by=by))
    found["logits by head, biases"] = _parts(one.attribute(logits, by="head", biases=True))
    several = lf.trace(model, [TEXT, "for i in"], hold=hold)
    found["several prompts"] = _parts(several.attribute(lf.Logit(answer), by="head"))
    found["next tokens"] = _parts(lf.attribute_next_tokens(one, by="sublayer"))
    scores = lf.attribute_scores(one, layer, 1, query=-2)
    pairs = {f"{q.label} . {k.label}": scores.values[i, j]
             for i, q in enumerate(scores.query_components)
             for j, k in enumerate(scores.key_components)}  # fmt: skip
    found["scores"] = pairs | {"total": scores.total, "log": scores.log_pattern} | _gap(scores)
    for side in ("query", "key"):
        target = lf.LogOdds(layer, 1, key=1, other=2, side=side)
        found[f"log-odds, {side}"] = _parts(one.attribute(target))
        found[f"score, {side}"] = _parts(one.attribute(lf.Score(layer, 1, key=2, side=side)))
    for of in ("pre", "post"):
        found[f"neuron, {of}"] = _parts(lf.attribute_neuron(one, layer, 3, of=of))
    found["residual"] = _parts(lf.decompose_residual(one, f"blocks.{layer}.hook_resid_pre"))
    way = lf.affine_map(one, answer, foil)
    found["affine map"] = _parts(way.contributions) | {"jacobian": way.jacobian}
    found["paths"] = _parts(lf.expand_paths(one, answer, foil, top_k=None, expansions=40))
    graph = lf.flow_graph(one, answer, foil)
    nodes = {name: torch.stack([graph.flow[i], graph.from_biases[i], graph.from_rest[i]])
             for i, name in enumerate(graph.names)}  # fmt: skip
    edges = {f"{edge.source} > {edge.target}": torch.tensor(edge.flow) for edge in graph.edges}
    found["flow"] = nodes | edges | _gap(graph)
    lens = lf.logit_lens(one)
    found["lens"] = {"values": lens.values} | _gap(lens)
    gone = ["embed", "L0H0"]
    for side in ("both", "query"):
        without = lf.counterfactual_pattern(one, layer, 1, gone, side=side)
        found[f"counterfactual, {side}"] = {
            "pattern": without.pattern, "original": without.original,
            "scores": without.scores.masked_fill(without.scores.isinf(), 0.0),
        } | _gap(without)  # fmt: skip
    labels = ["L0H1", f"L{layer}H0@2", "0_mlp_out", "1_attn_out", "L1N3", "embed"]
    labels += ["pos_embed"] if cfg.positional_embedding_type == "standard" else []
    labels += [f"L0H1 > L{layer}H0"]
    for with_ in ("zero", "mean"):
        effects = lf.ablate(one, labels, with_).compare(logits)
        rows = (effects.predicted, effects.direct, effects.total_effect)
        found[f"ablation, {with_}"] = {
            label: torch.stack([row[i] for row in rows])
            for i, label in enumerate(effects.components)
        } | _gap(effects)  # fmt: skip
    if hold:
        return found
    flips = lf.flip_distances(one, layer, "L0H1")
    found["flips"] = {"pre": flips.pre, "slope": flips.slope}
    weights = {f"heads {x}": lf.virtual_weights(model, "L0H1", f"L{layer}H0", x).AB for x in "QKV"}
    weights["neuron"] = lf.virtual_weights(model, "L0N3", f"L{layer}N4").AB
    weights["mlp"] = lf.virtual_weights(model, f"L{layer - 1}H2", f"{layer}_mlp_out").AB
    found["virtual weights"] = weights | {"out": lf.virtual_weights(model, "L0H1", "b_U").AB}
    tables = {"ov": lf.ov_table(model, 1, 1), "qk": lf.qk_table(model, 1, 1, offset=2)}
    tables |= {"bigram": lf.bigram_table(model), "neurons": lf.neuron_input_table(model, 1)}
    found["token tables"] = {name: table.row(5) for name, table in tables.items()}
    return found


def _parts(result):
    rows = dict(zip(result.labels, result.values, strict=True))
    return rows | {"the total": result.total} | _gap(result)


def _gap(result):
    gap = result.certificate.gap
    return {} if gap is None else {"the gap": torch.tensor(gap.absolute)}


# In transformer-lens 3.9


def write(folder):
    """Every layout of the bundled model, and small random models of other architectures."""
    from support.architectures import lnfree_model, make_model
    from support.models import freeze_all, make_gpt2, make_tokenizer

    live = lf.load(lf.bundled_checkpoint(), device="cpu")
    small = lf.load(make_gpt2(), tokenizer=make_tokenizer(), device="cpu")
    models = {"bundled live": live, "bundled sites": freeze_all(live), "random live": small}
    models["bundled folded"] = lf.fold(models["bundled sites"])
    models["random sites"] = freeze_all(small)
    for kind in ("neox", "neox-sequential", "llama-grouped"):
        made = {f"{kind} live": (make_model(kind), None), kind: (lnfree_model(kind), "sites")}
        for name, (model, form) in made.items():
            models[name] = lf.load(model, form=form, tokenizer=make_tokenizer(), device="cpu")
    for name, model in models.items():
        lf.export(model, folder / name)
        # It would undo how a norm with two constants was made one, which moves biases.
        (folder / name / "lnfree.json").unlink(missing_ok=True)
    for name in ("bundled live", "bundled folded"):
        lf.export(models[name], folder / f"{name}, native", target="transformer_lens")
    for path in sorted(folder.iterdir()):
        hold = "live" in path.name
        form = "sites" if not hold and not path.name.endswith("native") else None
        model = lf.load(path, form=form, dtype=torch.float64, device="cpu", check=False)
        numbers = {"certify": certified(model, hold)} | analyses(model, hold)
        torch.save(numbers, folder / path.name / "numbers.pt")


# In transformer-lens 4


def read(folder):
    """The same from bridges, compared."""
    from importlib.metadata import version

    assert version("transformer_lens").startswith("4."), version("transformer_lens")
    torch.set_grad_enabled(False)
    columns = {}
    failures = []
    for path in sorted(folder.iterdir()):
        expected, hold = torch.load(path / "numbers.pt", weights_only=True), "live" in path.name
        bridge = _native(path) if path.name.endswith("native") else _from_transformers(path)
        before = dict(bridge.cfg.__dict__)
        numbers = {"certify": certified(bridge, hold)} | analyses(bridge, hold)
        errors = {name: _error(x, expected[name]) for name, x in numbers.items()}
        if not hold and numbers["certify"].keys() == expected["certify"].keys():
            errors["certify"] = max(x.item() for x in numbers["certify"].values())
        if before != bridge.cfg.__dict__:
            failures.append(f"{path.name}: the config changed")
        if any(point._forward_hooks for point in bridge.hook_dict.values()):
            failures.append(f"{path.name}: a hook was left")
        columns[path.name] = errors
        layernorm = bridge.cfg.eps > 1e9 and not bridge.cfg.uses_rms_norm
        tolerance = DISGUISED if layernorm else TOLERANCE
        failures += [f"{path.name}: {name} differs by {error:.1e}, above {tolerance:.0e}"
                     for name, error in errors.items() if not error <= tolerance]  # fmt: skip
    table = pd.DataFrame(columns).to_string(float_format="{:.0e}".format, na_rep="")
    sys.stdout.write(f"largest relative errors against transformer-lens 3.9\n{table}\n")
    if failures:
        sys.exit("\n".join(failures))


def _error(found, expected):
    """Largest difference over all labels, in units of the largest number expected."""
    if set(found) != set(expected):
        apart = sorted(set(found) ^ set(expected))
        sys.stdout.write(f"labels on one side only: {apart[:5]}\n")
        return float("inf")
    largest = max(x.double().abs().max().item() for x in expected.values())
    error = max((found[k].double() - x.double()).abs().max().item() for k, x in expected.items())
    return error / largest


def _from_transformers(path):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(path), device="cpu", dtype=torch.float64)


def _native(path):
    from safetensors.torch import load_file
    from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint
    from transformers import AutoTokenizer

    said = json.loads((path / "hooked_transformer.json").read_text())["config"]
    names = (
        "d_model", "d_head", "n_heads", "n_layers", "n_ctx", "d_mlp", "d_vocab", "act_fn",
        "normalization_type", "eps",
    )  # fmt: skip
    cfg = TransformerBridgeConfig(**{name: said[name] for name in names})
    tokenizer = AutoTokenizer.from_pretrained(path)
    bridge = TransformerBridge.boot_native(cfg, tokenizer=tokenizer, dtype=torch.float64)
    weights = load_file(path / "model.safetensors")
    bridge.load_state_dict(convert_tl_checkpoint(weights, cfg), strict=True)
    return bridge.eval()


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
