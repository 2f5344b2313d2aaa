"""Peak memory and time of loading a GPT-2-small-shaped checkpoint, relative to its float32 size.

    python benchmarks/loading_memory.py [--runs 3] [--json FILE]

Writes random weights in GPT-2 small's shape (124M parameters, 498 MB), with live norms and in the
published LN-free format, and loads each in a process of its own. "above imports" is the peak of
resident memory less what the process held when everything was imported; files that are mapped into
memory count.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CASES = {
    "transformers alone, one forward pass": ("live", None),
    "live norms": ("live", {}),
    "live norms, check=False": ("live", {"check": False}),
    "LN-free, folded": ("lnfree", {}),
    "LN-free, folded, check=False": ("lnfree", {"check": False}),
    "LN-free, frozen form": ("lnfree", {"form": "frozen"}),
    "FakeLayerNorm pickle": ("fake", {}),
    "FakeLayerNorm pickle with LoRA": ("lora", {}),
    "nanoGPT ckpt.pt with its optimiser": ("nanogpt/ckpt.pt", {"sigma": [1.5, 12]}),
}


KINDS = ("live", "lnfree", "fake", "lora", "nanogpt")


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field}: this benchmark needs Linux")


def load_once(folder: str, options: dict | None) -> dict:
    """In this process: the peak above the imports, and the seconds."""
    import torch
    from transformers import GPT2LMHeadModel

    import lnfree_interp as lf

    assert lf.load is not lf.compare_logits  # names are imported on first use
    before, began = resident("VmRSS"), time.monotonic()
    if options is None:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            model(torch.zeros(2, 128, dtype=torch.long))
    else:
        if "sigma" in options:  # one constant for every norm of so many layers
            constant, layers = options["sigma"]
            norms = [f"blocks.{i}.{ln}" for i in range(layers) for ln in ("ln1", "ln2")]
            options["sigma"] = dict.fromkeys([*norms, "ln_final"], constant)
        model = lf.load(folder, device="cpu", **options)
    seconds = time.monotonic() - began
    kept = resident("VmRSS") - before
    del model
    return {"peak": resident("VmHWM") - before, "kept": kept, "seconds": seconds}


def write_checkpoints(folder: Path, kinds: Sequence[str] = KINDS) -> int:
    """Some formats; the number of bytes that the parameters take in float32."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPT2Config(architectures=["GPT2LMHeadModel"])
    model, last = GPT2LMHeadModel(config), config.vocab_size - 1
    words = {f"w{i}": i for i in range(last)} | {"<|endoftext|>": last}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>")),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )
    _write_pickles(model, tokenizer, folder, kinds)
    for name in [kind for kind in ("live", "lnfree") if kind in kinds]:
        if name == "lnfree":
            model.config.layer_norm_epsilon = 1e12
            with torch.no_grad():
                for key, W in model.named_parameters():
                    if "ln_" in key and key.endswith("weight"):
                        W.copy_(torch.rand_like(W) * 1e6)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return sum(W.numel() for W in model.parameters()) * 4


def _write_pickles(model: Any, tokenizer: Any, folder: Path, kinds: Sequence[str]) -> None:
    """The same model in the formats that only pickles hold (tests/published_formats.py)."""
    import torch

    config, state = model.config, model.state_dict()
    norms = [f"transformer.h.{i}.ln_{j}" for i in range(config.n_layer) for j in (1, 2)]
    fake = dict(state)
    for norm in [*norms, "transformer.ln_f"]:
        fake |= {f"{norm}.{flag}": torch.tensor(True) for flag in ("is_fake", "attn_v_is_fake")}
        fake[f"{norm}.average_std_buffer"] = torch.full((config.n_embd,), 1.5)
    lora, nanogpt = dict(fake), {}
    for name, W in state.items():
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        nanogpt[name] = W.T.contiguous() if linear else W
        if linear:
            module = name.removesuffix(".weight")
            lora[f"{module}.weight_frozen"] = lora.pop(name)
            lora[f"{module}.bias_frozen"] = lora.pop(f"{module}.bias")
            lora[f"{module}.lora_A"] = torch.randn(W.shape[0], 64) * 0.01
            lora[f"{module}.lora_B"] = torch.randn(64, W.shape[1]) * 0.01
    for name, content in (("fake", fake), ("lora", lora)):
        if name not in kinds:
            continue
        (folder / name).mkdir()
        torch.save(content, folder / name / "pytorch_model.bin")
        model.config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    if "nanogpt" not in kinds:
        return
    (folder / "nanogpt").mkdir()
    moments = {i: {"exp_avg": W, "exp_avg_sq": W.clone()} for i, W in enumerate(state.values())}
    arguments = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    arguments |= {"block_size": config.n_positions, "vocab_size": config.vocab_size}
    checkpoint = {"model": nanogpt, "model_args": arguments, "optimizer": {"state": moments}}
    torch.save(checkpoint, folder / "nanogpt" / "ckpt.pt")


def in_own_process(folder: str, options: dict | None) -> dict:
    """`load_once` where nothing else has used memory before."""
    child = subprocess.run(
        [sys.executable, __file__, "--child", folder, json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    """Run every case in its own process, several times; print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(load_once(arguments.child[0], json.loads(arguments.child[1]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        size = write_checkpoints(Path(scratch))
        results = {}
        for name, (kind, options) in CASES.items():
            runs = []
            for _ in range(arguments.runs):
                runs.append(in_own_process(f"{scratch}/{kind}", options))
            results[name] = {
                "peak_ratio": statistics.median(run["peak"] for run in runs) / size,
                "kept_ratio": statistics.median(run["kept"] for run in runs) / size,
                "seconds": statistics.median(run["seconds"] for run in runs),
            }
    print(f"float32 size {size / 1e6:.0f} MB; median of {arguments.runs} runs, above imports\n")
    print("| | peak / size | kept / size | seconds |\n|---|---|---|---|")
    for name, row in results.items():
        print(
            f"| {name} | {row['peak_ratio']:.2f} | {row['kept_ratio']:.2f} | {row['seconds']:.1f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": size, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
