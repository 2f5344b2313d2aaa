"""How the bundled checkpoint was trained: a small GPT-2 on the standard library's own source.

    python -m lnfree_interp.bundled.train OUT

A plain loop around `transformers.GPT2LMHeadModel`, so that the checkpoint is an ordinary GPT-2
that does not depend on this package. There is no dropout, as in `HookedTransformer`, so that
fine-tuning has the conditions of pretraining. `training.json` beside the weights keeps the
settings, the tokens seen and the held-out curve.
"""

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from datasets import Dataset
from jaxtyping import Float, Int
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lnfree_interp.data.packing import pack, token_stream
from lnfree_interp.data.stdlib import stdlib_corpus
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.removal.schedule import cosine_with_warmup

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Pretraining:
    """Settings of the bundled checkpoint's training run."""

    vocabulary: int = 4096
    n_ctx: int = 256
    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 6
    steps: int = 5000
    batch: int = 16
    """Windows of `n_ctx` tokens per step, drawn at random offsets of the training text."""
    lr: float = 2e-3
    warmup: int = 200
    final_lr: float = 0.02
    """Learning rate at the end, as a share of `lr`; cosine in between."""
    weight_decay: float = 0.1
    evaluate_every: int = 500
    seed: int = 0


def train_tokenizer(corpus: Dataset, settings: Pretraining) -> PreTrainedTokenizerFast:
    """A byte-level BPE in GPT-2's format, trained on the corpus."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        corpus["text"],
        vocab_size=settings.vocabulary,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=settings.n_ctx,
    )


def loss_of(
    model: GPT2LMHeadModel, tokens: Int[Tensor, "batch pos"], reduction: str = "mean"
) -> Float[Tensor, "..."]:
    """Next-token loss under autocast."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens).logits
    return next_token_loss(logits, tokens, reduction)


@torch.no_grad()
def heldout_loss(
    model: GPT2LMHeadModel, sequences: Int[Tensor, "sequence pos"], batch: int
) -> float:
    """Mean held-out cross-entropy in nats per token."""
    losses = [loss_of(model, chunk, "none") for chunk in sequences.split(batch)]
    return torch.cat(losses).mean().item()


def new_model(settings: Pretraining, end_of_text: int) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 of the settings' shape, dropout off."""
    config = GPT2Config(
        vocab_size=settings.vocabulary,
        n_positions=settings.n_ctx,
        n_embd=settings.d_model,
        n_layer=settings.n_layers,
        n_head=settings.n_heads,
        # The same function as GPT-2's gelu_new in one fused kernel; the saved config says gelu_new.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    return GPT2LMHeadModel(config)


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """An ordinary Hugging Face folder in float16, which halves what ships."""
    tokenizer.save_pretrained(out)
    half = GPT2LMHeadModel(model.config).half()
    half.load_state_dict(model.state_dict())
    half.config.activation_function = "gelu_new"
    half.save_pretrained(out)
    half.config.activation_function = "gelu_pytorch_tanh"


def main(out: tyro.conf.Positional[Path], settings: Pretraining = Pretraining()) -> None:
    """Train the tokenizer and the model and write the Hugging Face folder OUT.

    Args:
        out: Folder to write; replaced at every evaluation, so that a run can be watched.
        settings: Sizes and the training schedule.
    """
    torch.manual_seed(settings.seed)
    train, heldout = stdlib_corpus("train"), stdlib_corpus("heldout")
    tokenizer = train_tokenizer(train, settings)
    stream = token_stream(train, tokenizer)
    sequences = pack(heldout, tokenizer, settings.n_ctx)
    model = new_model(settings, tokenizer.vocab[END_OF_TEXT])
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    window = torch.arange(settings.n_ctx)
    curve: list[dict[str, float]] = []
    began = time.monotonic()
    for step in (bar := tqdm(range(settings.steps), desc="pretraining")):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * cosine_with_warmup(
                step, steps=settings.steps, warmup=settings.warmup, floor=settings.final_lr
            )
        starts = torch.randint(len(stream) - settings.n_ctx + 1, (settings.batch, 1))
        loss = loss_of(model, stream[starts + window])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        done = step + 1
        if done % settings.evaluate_every == 0 or done == settings.steps:
            tokens_seen = done * settings.batch * settings.n_ctx
            curve.append(
                {
                    "step": done,
                    "tokens": tokens_seen,
                    "epochs": round(tokens_seen / len(stream), 2),
                    "heldout": round(heldout_loss(model, sequences, settings.batch), 4),
                }
            )
            tqdm.write(json.dumps(curve[-1]))
            save(model, tokenizer, out)
            record = {
                "settings": asdict(settings),
                "train_tokens": len(stream),
                "heldout_tokens": sequences.numel(),
                "parameters": sum(p.numel() for p in model.parameters()),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "minutes": round((time.monotonic() - began) / 60, 1),
                "curve": curve,
            }
            (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
