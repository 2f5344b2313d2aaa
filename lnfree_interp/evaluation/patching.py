"""Attribution patching against activation patching.

Activation patching puts the clean stream back at one place of a corrupted run and measures what
that restores; attribution patching estimates the same from one gradient (Nanda 2023). The error of
the estimate was expected to shrink without norms, but 2507.02559 finds that it does not. Both are
measured here on the logit of the true next token.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.evals import IOIDataset

from lnfree_interp.analysis.prompts import read_sequences
from lnfree_interp.errors import DataError
from lnfree_interp.models.construct import original_tokenizer
from lnfree_interp.models.running import logits_at, run, run_and_keep, watched

_NAMES = (
    "John Mary Tom James Dan Martin Amy Anna Mark Paul Laura David Sarah Peter Kate Jack Emma Adam "
    "Jane Alex Chris Lisa Simon Rose Scott Ruth Alan Grace Frank Lucy"
)


@dataclass(frozen=True, eq=False)
class Patching:
    """How much of the logit patching `resid_pre` restores, measured and estimated."""

    measured: Float[Tensor, "layer pos prompt"]
    """What activation patching restores, in logits."""
    estimated: Float[Tensor, "layer pos prompt"]
    """The estimate of attribution patching: the corrupted run's gradient times (clean -
    corrupted)."""
    total: Float[Tensor, " prompt"]
    """The logit of the clean run minus that of the corrupted run."""

    @property
    def error_by_layer(self) -> Float[Tensor, " layer"]:
        """The absolute errors, summed over positions, divided by the mean absolute total."""
        error = (self.estimated - self.measured).abs().sum(1).mean(1)
        return error / self.total.abs().mean()

    @property
    def error(self) -> float:
        """The mean of `error_by_layer`."""
        return self.error_by_layer.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `error`, by leaving out one prompt at a time (jackknife); nan for a
        single prompt."""
        errors = (self.estimated - self.measured).abs().sum(1).mean(0).double()
        totals, n = self.total.abs().double(), len(self.total)
        without = (errors.sum() - errors) / (totals.sum() - totals)
        return (without.var(correction=0) * (n - 1)).sqrt().item() if n > 1 else math.nan

    @property
    def correlation(self) -> float:
        """Pearson's correlation between measured and estimated, over all places and prompts."""
        both = torch.stack([self.measured.flatten(), self.estimated.flatten()])
        return torch.corrcoef(both.double())[0, 1].item()


def corrupted_pairs(
    tokens: Int[Tensor, "sequence pos"], n: int = 16, length: int = 32, seed: int = 0
) -> tuple[Int[Tensor, "prompt cut"], Int[Tensor, "prompt cut"], Int[Tensor, " prompt"]]:
    """Prompts from a text, the same prompts with one token replaced, and the true next tokens.

    The replacements are tokens from elsewhere in the text. A token among the last eight is
    replaced, on which the next token depends.

    Args:
        tokens: Token ids [sequence, pos], with sequences longer than `length`.
        n: How many prompts to make.
        length: The length of each prompt, in tokens.
        seed: The seed of the prompts, places and replacements.

    Returns:
        Clean prompts and corrupted ones, each [prompt, length], and the true next tokens [prompt].

    Raises:
        DataError: if the text is too short, or all its tokens are the same.

    Source:
        Ours: activation patching (arXiv 2202.05262) needs pairs of equal length, here from any
        text.

    Examples:
        >>> clean, corrupted, targets = lf.corrupted_pairs(tokens, n=4, length=8)
        >>> (clean != corrupted).sum(1)
        tensor([1, 1, 1, 1])
    """
    if tokens.shape[1] <= length or len(tokens) < 1 or length < 2 or n < 1:
        raise DataError(
            f"{n} prompts of {length} tokens and a next one do not fit into sequences of shape "
            f"{list(tokens.shape)}: give n of at least 1, a length of at least 2, or longer "
            "sequences"
        )
    if len(tokens.unique()) == 1:
        raise DataError(
            "all tokens of the text are the same, so there is nothing to replace one with: give "
            "another text"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    clean, corrupted, targets = [], [], []
    while len(clean) < n:
        row, start = tokens[draw(len(tokens))].cpu(), draw(tokens.shape[1] - length)
        prompt = row[start : start + length]
        other, place = int(tokens[draw(len(tokens)), draw(tokens.shape[1])]), length - 1
        place -= draw(min(8, length - 1))
        if other != int(prompt[place]):
            changed = prompt.clone()
            changed[place] = other
            clean.append(prompt)
            corrupted.append(changed)
            targets.append(row[start + length])
    return torch.stack(clean), torch.stack(corrupted), torch.stack(targets)


def ioi_pairs(
    model: HookedTransformer, n: int = 480, seed: int = 0, *, prepend_bos: bool | None = None
) -> tuple[
    Int[Tensor, "prompt pos"],
    Int[Tensor, "prompt pos"],
    Int[Tensor, " prompt"],
    Int[Tensor, " prompt"],
]:
    """Prompts about an indirect object, the same with the two names swapped, and both answers.

    They come from TransformerLens' `IOIDataset`; names are one token each, and all prompts have the
    same length.

    Args:
        model: The model whose tokenizer reads the prompts.
        n: How many prompts to make.
        seed: The seed of names and nouns.
        prepend_bos: Whether each prompt starts with the beginning-of-sequence token. Default: what
            the model does with text, `cfg.default_prepend_bos`.

    Returns:
        Clean and corrupted token ids, [prompt, pos]; then the right name after the clean prompt and
        the other name, each [prompt]: the arguments of `patch_residual`, in order.

    Raises:
        DataError: if the model has no tokenizer, n is less than one, or fewer than two names are
            one token.

    Source:
        The task: arXiv 2211.00593. 480 swaps of names to compare attribution with activation
        patching, on GPT-2 without a beginning-of-sequence token: arXiv 2507.02559.

    Examples:
        >>> prompts = lf.ioi_pairs(gpt2, prepend_bos=False)  # doctest: +SKIP
        >>> lf.patch_residual(gpt2, *prompts).error  # doctest: +SKIP
    """
    if model.tokenizer is None:
        raise DataError(
            "the model has no tokenizer to read prompts about an indirect object with: load it "
            "with one"
        )
    tokenizer = original_tokenizer(model.tokenizer)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    names = [name for name in _NAMES.split() if len(ids(name)) == len(ids(f" {name}")) == 1]
    if n < 1 or len(names) < 2:
        raise DataError(
            f"{n} prompts were asked for, and {len(names)} names are one token of this tokenizer: "
            "the task is for models of English, and needs at least one prompt and two names"
        )
    begins = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    bos = [model.tokenizer.bos_token_id] if begins else []
    state = random.getstate()  # IOIDataset sets the seed of the whole process
    try:
        drawn = IOIDataset(
            tokenizer, names=names, num_samples=16 * n, symmetric=True, prepend_bos=False, seed=seed
        ).samples
    finally:
        random.setstate(state)
    rows = [
        (
            bos + ids(clean["text"].removesuffix(clean["IO"])),
            bos + ids(swapped["text"].removesuffix(swapped["IO"])),
            ids(clean["IO"])[0],
            ids(clean["S"])[0],
        )
        for clean, swapped in zip(drawn[::2], drawn[1::2], strict=True)
    ]
    length = Counter(len(row[0]) for row in rows).most_common(1)[0][0]
    kept = [row for row in rows if len(row[0]) == len(row[1]) == length][:n]
    if len(kept) < n:
        raise DataError(
            f"there are only {len(kept)} prompts of {length} tokens each, not {n}: ask for fewer"
        )
    clean, corrupted, targets, foils = (torch.tensor(column) for column in zip(*kept, strict=True))
    return clean, corrupted, targets, foils


def patch_residual(
    model: HookedTransformer,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    targets: Int[Tensor, " prompt"],
    foils: Int[Tensor, " prompt"] | None = None,
    batch: int = 16,
    progress: bool = False,
) -> Patching:
    """Patch `resid_pre` at every layer and position: by runs of the model, and by its gradient.

    Args:
        model: A `HookedTransformer` in any form.
        clean: Token ids of the clean prompts, [prompt, pos].
        corrupted: Token ids of the corrupted prompts, [prompt, pos]; see `corrupted_pairs`.
        targets: The token whose logit is read after each prompt, [prompt].
        foils: The tokens whose logits are subtracted, [prompt].
        batch: How many prompts run at once.
        progress: Whether to show a progress bar.

    Returns:
        A `Patching` with measured and estimated [layer, pos, prompt] and the total [prompt], in
            logits.

    Raises:
        DataError: if shapes differ, batch is less than one, or the model cannot read the tokens.

    Source:
        Activation patching: arXiv 2202.05262. Attribution patching:
        https://www.neelnanda.io/mechanistic-interpretability/attribution-patching and arXiv
        2310.10348. Compared as in arXiv 2507.02559.

    Examples:
        >>> clean, corrupted, targets = lf.corrupted_pairs(tokens, n=4, length=8)
        >>> patching = lf.patch_residual(model, clean, corrupted, targets)
        >>> patching.measured.shape
        torch.Size([4, 8, 4])
    """
    if clean.shape != corrupted.shape or len(targets) != len(clean):
        raise DataError(
            f"the clean tokens have shape {list(clean.shape)}, the corrupted ones "
            f"{list(corrupted.shape)}: give the same shape, and a target for each prompt"
        )
    if batch < 1:
        raise DataError(f"batch={batch}: at least one prompt runs at once")
    clean, corrupted = read_sequences(model, clean), read_sequences(model, corrupted)
    answers = torch.stack([targets] if foils is None else [targets, foils], dim=1).to(clean.device)
    rows, found = [x.split(batch) for x in (clean, corrupted, answers)], []
    with tqdm(
        total=model.cfg.n_layers * len(rows[0]), desc="activation patching", unit="layer",
        disable=not progress,
    ) as bar:  # fmt: skip
        for some in zip(*rows, strict=True):
            found.append(_patch(model, *some, bar=bar))
    measured, estimated, total = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return Patching(measured, estimated, total)


def _patch(
    model: HookedTransformer,
    clean: Tensor,
    corrupted: Tensor,
    answers: Int[Tensor, "prompt answer"],
    bar: tqdm,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `Patching` has, of some prompts; a second answer is a foil."""
    n_layers, n_pos = model.cfg.n_layers, clean.shape[1]
    hooks = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]

    def metric(stream: Tensor) -> Float[Tensor, " prompt"]:
        end = logits_at(model, stream, slice(n_pos - 1, n_pos))[:, 0]
        wanted, *against = end.gather(-1, answers).unbind(-1)
        return wanted - against[0] if against else wanted

    with torch.no_grad():
        after_clean, there = run_and_keep(model, clean, hooks, n_layers)
        after_corrupted, here = run_and_keep(model, corrupted, hooks, n_layers)
        base = metric(after_corrupted)
        total = metric(after_clean) - base
    gradients = _gradients(model, here[hooks[0]], hooks, metric)
    measured = torch.empty(n_layers, n_pos, len(clean), dtype=total.dtype)
    estimated = torch.empty_like(measured)
    for layer, hook in enumerate(hooks):
        moved = there[hook] - here[hook]
        estimated[layer] = torch.linalg.vecdot(gradients[hook], moved).T.cpu()
        for pos in range(n_pos):
            stream = here[hook].clone()
            stream[:, pos] = there[hook][:, pos]
            with torch.no_grad():
                after = run(model, stream, n_layers, layer)
                measured[layer, pos] = (metric(after) - base).cpu()
        bar.update()
    return measured, estimated, total.cpu()


def _gradients(
    model: HookedTransformer, start: Tensor, hooks: list[str], metric
) -> dict[str, Float[Tensor, "prompt pos d_model"]]:
    """The gradient of the metric with respect to the stream before every block."""
    with torch.enable_grad():
        stream = start.detach().requires_grad_()
        with watched(model, hooks) as streams:
            after = run(model, stream, model.cfg.n_layers)
        found = torch.autograd.grad(metric(after).sum(), [streams[hook] for hook in hooks])
    return dict(zip(hooks, found, strict=True))
