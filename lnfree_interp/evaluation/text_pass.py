"""One pass of several models over a text, for all measures that are a number per token.

The models run on each batch in turn, so that each can be compared with the original token by token
without keeping any logits.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.logit_targets import POSITIONS
from lnfree_interp.analysis.prompts import batches, read_sequences
from lnfree_interp.analysis.stream import Place
from lnfree_interp.errors import DataError
from lnfree_interp.models.loss import entropy_of, loss_of
from lnfree_interp.models.running import Edit, logits_at, run_and_keep
from lnfree_interp.models.weighing import weighing_of
from lnfree_interp.numerics import wide

SINK = 0.3
"""Attention to the first token above this value counts as a sink."""

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, eq=False)
class TokenMeasures:
    """The measures of one model on a text, on the CPU."""

    loss: Float[Tensor, "sequence target"]
    """The loss in nats, in float64."""
    entropy: Float[Tensor, "sequence target"]
    """The entropy of the predicted distribution, in nats."""
    confidence: Float[Tensor, "sequence target"]
    """The probability of the most likely token."""
    correct: Bool[Tensor, "sequence target"]
    """Whether the most likely token was the true one."""
    divergence: Float[Tensor, "sequence target"] | None
    """The Jensen-Shannon divergence from the original's prediction, in nats; None without an
    original."""
    kl: Float[Tensor, "sequence target"] | None
    """The KL divergence from the original's prediction, in nats; None without an original."""
    agrees: Bool[Tensor, "sequence target"] | None
    """Whether the original's most likely token is the same; None without an original."""
    norms: Float[Tensor, "place sequence pos"]
    """The norms of the residual stream before each block and after the last."""
    sink_weights: Float[Tensor, "sequence layer head"]
    """The attention to the first token, averaged over queries."""
    sink_queries: Float[Tensor, "sequence layer head"]
    """The share of queries whose attention to the first token is above `SINK`."""


@torch.no_grad()
def measure_text(
    models: Mapping[str, HookedTransformer],
    tokens: Int[Tensor, "sequence pos"],
    original: str | None = None,
    *,
    batch: int | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> dict[str, TokenMeasures]:
    """One pass of several models over a text.

    Args:
        models: The models by name.
        tokens: Token ids [sequence, pos], such as `pack(...)`.
        original: The name of the model that the others are compared with.
        batch: How many sequences run at once. Default: as many as fit into free memory; results
            depend on it by rounding only.
        precision: The precision of matrix products inside the blocks. `"bfloat16"` is faster on
            most hardware; it changes single losses by tenths of a nat, but hardly their mean.
            Logits are float32 either way.
        progress: Whether to show a progress bar.

    Raises:
        DataError: if a model cannot read the tokens, or vocabularies differ.
    """
    tokens = read_for_all(models, tokens, original, precision)
    order = ([original] if original else []) + [name for name in models if name != original]
    if batch is None:
        batch = min(fitting_batch(model, tokens.shape[1]) for model in models.values())
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    with tqdm(total=len(tokens), desc="evaluating", unit="sequence", disable=not progress) as bar:
        for chunk in batches(tokens, batch):
            streams = {}
            for name in order:
                with _products(models[name], precision):
                    streams[name], about = _stream(models[name], chunk)
                parts[name].append(about)
            for name, found in _predictions(models, streams, chunk, original, order):
                parts[name][-1] |= found
            bar.update(len(chunk))
    return {name: _joined(found) for name, found in parts.items()}


def read_for_all(
    models: Mapping[str, HookedTransformer],
    tokens: Int[Tensor, "sequence pos"],
    original: str | None,
    precision: Precision,
) -> Int[Tensor, "sequence pos"]:
    """The token ids on the CPU, checked: every model can read them.

    Raises:
        DataError: as for `measure_text`.
    """
    if not isinstance(models, Mapping) or not models:
        raise DataError("models must be given by name, at least one: {'gpt2': model, ...}")
    if precision not in get_args(Precision):
        raise DataError(f"precision is {' or '.join(get_args(Precision))}, not {precision!r}")
    if original is not None and original not in models:
        raise DataError(f"no model is called {original!r}: there are {', '.join(models)}")
    sizes = {model.cfg.d_vocab_out for model in models.values()}
    if original is not None and len(sizes) > 1:
        raise DataError(
            f"models with vocabularies of {sorted(sizes)} tokens cannot be compared: evaluate them "
            "without an original"
        )
    for model in models.values():
        tokens = read_sequences(model, tokens, packed=True).cpu()
    return tokens


def fitting_batch(model: HookedTransformer, pos: int) -> int:
    """How many sequences have activations that fit into a quarter of the free memory, 1 to 32."""
    cfg, device = model.cfg, model.W_E.device
    scores = 4 * cfg.n_heads * pos * pos
    hidden = 4 * pos * ((cfg.d_mlp or 0) + 4 * cfg.d_model)
    logits = 6 * min(pos, POSITIONS) * cfg.d_vocab_out
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept  # what the allocator has, and nothing uses
    else:
        free = min(_free_memory(), 4 * 2**30)
    return max(1, min(32, int(free / 4 / (4 * (scores + hidden + logits)))))


def _free_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # macOS, Windows
        return 4 * 2**30


def _products(model: HookedTransformer, precision: Precision) -> Any:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(model.W_E.device.type, torch.bfloat16)


def _stream(model: HookedTransformer, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The stream after the last block, and the measures that are taken on the way to it."""
    n_layers = model.cfg.n_layers
    places = [Place(layer).hook for layer in range(n_layers + 1)]
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n_layers)]
    found: dict[str, Tensor] = {}

    def norm(name: str) -> Edit:
        return lambda x: found.__setitem__(name, wide(x).norm(dim=-1).cpu())

    def sink(name: str) -> Edit:
        attn = model.get_submodule(name.rpartition(".")[0])
        counted = weighing_of(attn) == "count"

        def look(x: Tensor) -> None:
            to_first = wide(x[..., 0])
            if counted:  # the weights do not add up to one
                to_first = to_first / wide(x).sum(-1)
            both = torch.stack([to_first.mean(-1), (to_first > SINK).to(to_first).mean(-1)])
            found[name] = both.cpu()

        return look

    looks = {place: norm(place) for place in places} | {hook: sink(hook) for hook in patterns}
    tokens = tokens.to(model.W_E.device)
    stream, _ = run_and_keep(model, tokens, (), n_layers, edits=looks)
    sinks = torch.stack([found[name] for name in patterns], dim=2)
    return stream, {
        "norms": torch.stack([found[name] for name in places]),
        "sink_weights": sinks[0],
        "sink_queries": sinks[1],
    }


def _predictions(
    models: Mapping[str, HookedTransformer],
    streams: Mapping[str, Tensor],
    tokens: Tensor,
    original: str | None,
    order: list[str],
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Loss, entropy and so on of every next token, from the logits of a few positions at a time."""
    pieces: dict[str, list[dict[str, Tensor]]] = {name: [] for name in order}
    n_targets = tokens.shape[1] - 1
    for start in range(0, n_targets, POSITIONS):
        at = slice(start, min(start + POSITIONS, n_targets))
        targets, theirs = tokens[:, 1:][:, at], None
        their_best = None
        for name in order:
            model = models[name]
            # This is not in bfloat16, which would round logits of 100 to halves.
            log_p = wide(logits_at(model, streams[name], at)).log_softmax(-1)
            wanted = targets.to(log_p.device)
            best = log_p.max(-1)
            found = {
                "loss": loss_of(log_p, wanted),
                "entropy": entropy_of(log_p),
                "confidence": best.values.exp(),
                "correct": best.indices == wanted,
            }
            if original is not None:
                if name == original:
                    theirs, their_best = log_p, best.indices
                assert theirs is not None
                assert their_best is not None
                given = theirs.to(log_p.device)
                found["divergence"] = _jensen_shannon(log_p, given)
                kl = F.kl_div(log_p, given, reduction="none", log_target=True)
                found["kl"] = kl.sum(-1)
                found["agrees"] = best.indices == their_best.to(log_p.device)
            pieces[name].append({key: value.cpu() for key, value in found.items()})
            pieces[name][-1]["loss"] = pieces[name][-1]["loss"].double()
    for name in order:
        keys = pieces[name][0]
        yield name, {key: torch.cat([piece[key] for piece in pieces[name]], 1) for key in keys}


def _jensen_shannon(
    log_p: Float[Tensor, "*token d_vocab"], log_q: Float[Tensor, "*token d_vocab"]
) -> Float[Tensor, "*token"]:
    """(KL(p || m) + KL(q || m)) / 2 with m halfway between, in nats, at most ln 2."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    sums = [F.kl_div(log_m, x, reduction="none", log_target=True).sum(-1) for x in (log_p, log_q)]
    return (sums[0] + sums[1]).clamp(min=0) / 2


def _joined(parts: list[dict[str, Any]]) -> TokenMeasures:
    joined = {
        key: torch.cat([part[key] for part in parts], dim=1 if key == "norms" else 0)
        for key in parts[0]
    }
    compared: Any = {key: joined.pop(key, None) for key in ("divergence", "kl", "agrees")}
    return TokenMeasures(**compared, **joined)
