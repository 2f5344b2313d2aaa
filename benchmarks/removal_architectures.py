"""Removal on other architectures: a small GPT-NeoX and a small Llama, trained here, then freed.

    python benchmarks/removal_architectures.py [--json FILE]

Each is trained from scratch on the source of Python's standard library by a plain loop around the
transformers class, loaded, and loses its norms (LayerNorms in parallel blocks; RMSNorms beside
gated MLPs and grouped queries) with `recipes.distilled`; the control keeps them. Loss on held-out
modules, in nats per token.
"""

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import tyro
from transformers import (
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

import lnfree_interp as lf
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.removal.schedule import cosine_with_warmup

_SIZE = {
    "vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "GPT-NeoX": GPTNeoXConfig(**_SIZE, intermediate_size=512),
    "Llama": LlamaConfig(**_SIZE, intermediate_size=344, num_key_value_heads=2),
}


def pretrained(config: PretrainedConfig, text: torch.Tensor, steps: int) -> PreTrainedModel:
    """Trained from scratch."""
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine_with_warmup(step, steps=steps, warmup=50, floor=0.05)
        batch = text[torch.randint(len(text), (16,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch).logits
        next_token_loss(logits, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def one(
    name: str, tokenizer: PreTrainedTokenizerBase, pretraining: int, steps: int, seed: int
) -> dict[str, float | str]:
    """Train, remove, compare."""
    text = {
        split: lf.pack(lf.stdlib_corpus(split), tokenizer, 128) for split in ("train", "heldout")
    }
    heldout = text["heldout"][::4]
    model = lf.load(pretrained(CONFIGS[name], text["train"], pretraining), tokenizer=tokenizer)
    recipe = lf.recipes.distilled(model, steps=steps, seed=seed)
    run = lf.remove_norms(model, recipe, text["train"], progress=False)
    control = lf.remove_norms(model, recipe.vanilla(), text["train"], progress=False)
    free = lf.fold(run.model)
    losses = {
        what: lf.evaluate_loss(m, heldout).mean
        for what, m in (("original", model), ("vanilla", control.model), ("LN-free", free))
    }
    return {
        "model": name,
        "norms": str(model.cfg.normalization_type),
        "sites": str(len(recipe.events)),
        **losses,
        "gap": losses["LN-free"] - losses["vanilla"],
        "fold": lf.compare_logits(free, run.model).relative,
    }


def main(
    pretraining: int = 1500,
    steps: int = 400,
    seed: int = 0,
    out: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Run the benchmark.

    Args:
        pretraining: Steps of the training from scratch, of 2048 tokens.
        steps: Steps of the removal, of 1024 tokens.
        seed: Random seed of the order of the removal's text.
        out: Also write the rows there.
    """
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(lf.bundled_checkpoint())
    print("| model | norms | sites | original | vanilla | LN-free | LN-free minus vanilla |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in CONFIGS:
        row = one(name, tokenizer, pretraining, steps, seed)
        rows.append(row)
        print(
            f"| {name} | {row['norms']} | {row['sites']} | {row['original']:.4f} "
            f"| {row['vanilla']:.4f} | {row['LN-free']:.4f} | {row['gap']:+.4f} |",
            flush=True,
        )
    print(
        f"pretraining {pretraining} steps of 2048 tokens, removal {steps} of 1024; seed {seed}; "
        f"folded against frozen: at most {max(float(row['fold']) for row in rows):.1e}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of "
        f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}"
    )
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
