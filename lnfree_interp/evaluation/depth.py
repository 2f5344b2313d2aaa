"""What depth does in a model: how the stream grows, and how far each block is from doing nothing.

A block adds what it writes to the stream: with J the Jacobian of the stream behind a block by the
stream before it, J - I is the Jacobian of what the block writes (`jacobians`). Where the stream is
multiplied by factors as it goes past a block (NormFormer's `resid_scale`), they are a change of its
units, in which all is measured: doing nothing is to multiply by them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.prompts import batches, read_sequences
from lnfree_interp.analysis.stream import Place
from lnfree_interp.data.named import spread
from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.jacobians import (
    CENTRED,
    COMPLETED,
    WHOLE,
    Seen,
    Units,
    Written,
    distance_from_identity,
    largest_eigenvalues,
)
from lnfree_interp.evaluation.text_pass import fitting_batch
from lnfree_interp.models.crms import is_crms
from lnfree_interp.models.folding import reads_stream
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.maps import CRMSNormMap
from lnfree_interp.models.running import run, run_and_keep
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.models.sites import live_sites, norm_at, norm_path

IN_A_BASIS = ("variance", "variance_first", "angles", "jacobian_distance")
"""The measures that a change of basis of the stream changes. Live norms forbid all changes but
rotations, one factor for the whole stream, and, where they subtract it, a change of its mean."""


@dataclass(frozen=True, eq=False)
class DepthReport:
    """How the stream of a model grows with depth, and what each of its blocks does to it."""

    variance: Float[Tensor, " place"]
    """The variance of the stream over channels before each block and after the last, averaged over
    all tokens but the first of each sequence; its mean square in a model whose norms do not
    subtract the mean, with the channel that a CRMSNorm completes it by. One factor for all places
    says nothing: norms do not see it."""
    variance_first: Float[Tensor, " place"]
    """The same of the first tokens, which in many models have massive activations."""
    angles: Float[Tensor, "place place"]
    """The angle between the stream at two places, over pi: 0 for one direction, 1/2 for orthogonal
    ones, 1 for opposite ones; averaged over the last tokens of the sequences. Without the stream's
    mean over channels where norms subtract it, as in `jacobian_distance`."""
    jacobian_distance: Float[Tensor, " layer"]
    """How far each block is from doing nothing: the Frobenius norm of J - I over sqrt(d_model),
    where J is the Jacobian of a token's stream behind the block by its own before it, with one
    channel more for a CRMSNorm. The root of the mean square over prompts, at their last tokens."""
    jacobian_distance_error: Float[Tensor, " layer"]
    """The standard error of it, from the random vectors and the prompts."""
    eigenvalues: Complex[Tensor, "layer prompt eigenvalue"]
    """The eigenvalues of J - I with the largest absolute values, largest first; nan where the
    iteration found fewer."""
    loss: float
    """Cross-entropy of the model, in nats per token."""
    loss_without: Float[Tensor, " layer"]
    """What cross-entropy gains when a block is left out, in nats per token."""
    basis_fixed: bool
    """Whether live norms read the stream, or what sublayers write to it. Without them it can be
    written in any basis: then `basis_free` says which measures are about the function."""
    n_tokens: int
    """How many predictions the losses are means of."""

    @property
    def basis_free(self) -> tuple[str, ...]:
        """The measures that mean something: all while live norms fix the basis, else those that
        are the same in every basis: losses and eigenvalues."""
        always = ("eigenvalues", "loss_without")
        return (*IN_A_BASIS, *always) if self.basis_fixed else always

    @property
    def spectral_radius(self) -> Float[Tensor, " layer"]:
        """The largest absolute eigenvalue of J - I in each block, averaged over prompts."""
        if self.eigenvalues.shape[-1] == 0:
            return torch.full((len(self.loss_without),), torch.nan)
        return self.eigenvalues[..., 0].abs().mean(1)

    @property
    def least_needed(self) -> int:
        """The block without which the loss is lowest."""
        return int(self.loss_without.nan_to_num(torch.inf).argmin())

    def to_frame(self) -> pd.DataFrame:
        """A row for each block: `layer`; the `variance` behind it; the `angle` by which it turns
        the stream, over pi; `jacobian_distance`, `spectral_radius`; and `loss_without`, in nats
        per token."""
        n = len(self.loss_without)
        return pd.DataFrame(
            {
                "layer": range(n),
                "variance": self.variance[1:].tolist(),
                "angle": self.angles.diagonal(1).tolist(),
                "jacobian_distance": self.jacobian_distance.tolist(),
                "spectral_radius": self.spectral_radius.tolist(),
                "loss_without": self.loss_without.tolist(),
            }
        )

    def __repr__(self) -> str:
        growth = (self.variance[-1] / self.variance[1]).item()
        least = self.least_needed
        basis = "" if self.basis_fixed else ", which depends on the basis of the stream"
        return (
            f"DepthReport({len(self.loss_without)} blocks, {self.n_tokens:,} tokens of loss "
            f"{self.loss:.3f}: block {least} is needed least, {self.loss_without[least]:+.4f} nats "
            f"without it; behind the first block variance grows {growth:.3g} times{basis})"
        )


def depth_report(
    model: HookedTransformer,
    text: Int[Tensor, "sequence pos"],
    *,
    prompts: int = 4,
    vectors: int = 8,
    eigenvalues: int = 8,
    batch: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DepthReport:
    """How the stream grows with depth, how far each block is from the identity, and what it is for.

    Args:
        model: A `HookedTransformer` in any form. It does not change.
        text: Token ids [sequence, pos], such as `pack(...)`. Losses, variances and angles are
            measured on all of it; angles on the last token of each sequence, so give dozens.
        prompts: The number of sequences, spread over the text, at whose last tokens Jacobians are
            measured.
        vectors: The number of random vectors for each prompt that the distance from the identity
            is estimated with.
        eigenvalues: The number of eigenvalues of each block and prompt; 0: none, which is faster.
            At most d_model - 2.
        batch: How many sequences run at once. Default: as many as fit into memory.
        seed: The seed of the random vectors.
        progress: Whether to show a progress bar.

    Returns:
        A `DepthReport`. `lf.plots.depth(...)`, `lf.plots.angles(...)` and `lf.plots.spectrum(...)`
            draw it. On a model without live norms only losses and eigenvalues are about the
            function; variances, angles and the distance depend on the basis of the stream, which
            is then arbitrary (`basis_free`).

    Raises:
        DataError: if the model cannot read the text, or a number is not allowed.

    Source:
        arXiv 2502.05795 for variance, angular distance (of arXiv 2403.17887) and leaving blocks
        out. Ours: the distance and the spectrum from products alone, and which measures mean
        something without norms.

    Examples:
        >>> report = lf.depth_report(model, tokens, prompts=2, progress=False)
        >>> report.variance.shape, report.angles.shape, report.eigenvalues.shape
        (torch.Size([5]), torch.Size([5, 5]), torch.Size([4, 2, 8]))
        >>> lf.depth_report(free, tokens, prompts=1, eigenvalues=0, progress=False).basis_free
        ('eigenvalues', 'loss_without')
    """
    tokens = read_sequences(model, text, packed=True)
    largest = model.cfg.d_model - 2
    if prompts < 1 or vectors < 2 or not 0 <= eigenvalues <= largest:
        raise DataError(
            f"prompts={prompts}, vectors={vectors} and eigenvalues={eigenvalues} were given: give "
            f"at least 1 prompt and 2 vectors, and 0 to {largest} eigenvalues"
        )
    sample, n_layers = spread(tokens, prompts), model.cfg.n_layers
    total = len(tokens) + n_layers
    with tqdm(total=total, desc="depth", unit="sequence or block", disable=not progress) as bar:
        if batch is None:
            batch = fitting_batch(model, tokens.shape[1])
        seen = _seen_by_norms(model)
        sums, units = _StreamSums(n_layers, seen), _units(model)
        losses = []
        for chunk in batches(tokens, batch):
            loss, streams = _left_out(model, chunk)
            losses.append(loss)
            sums.add([x / unit for x, unit in zip(streams, units, strict=True)])
            bar.update(len(chunk))
        distances, found = [], []
        for block, resid, around in _blocks(model, sample, units):
            written = Written(block, resid, around)
            distances.append(distance_from_identity(written, vectors, seed, seen))
            found.append(largest_eigenvalues(block, resid, eigenvalues, seed, around))
            bar.update()
    mean = torch.cat(losses, 1).mean(1)
    return DepthReport(
        **sums.read(),
        jacobian_distance=torch.stack([distance for distance, _ in distances]),
        jacobian_distance_error=torch.stack([error for _, error in distances]),
        eigenvalues=torch.stack(found),
        loss=mean[0].item(),
        loss_without=mean[1:] - mean[0],
        basis_fixed=any(map(_fixes_basis, live_sites(model))),
        n_tokens=tokens[:, 1:].numel(),
    )


def _fixes_basis(live: NormSite) -> bool:
    """Whether a live norm divides by a length of the stream, or of what is written to it. What
    stands before W_O or W_out is in channels of its own."""
    return reads_stream(str(live)) or live.kind in ("ln1_post", "ln2_post")


def _seen_by_norms(model: HookedTransformer) -> Seen:
    """What the model's norms see of the stream: nothing reads a mean that they subtract, and a
    CRMSNorm stands for a stream with one channel more."""
    if model.cfg.normalization_type is None:
        return WHOLE
    if any(_past(block) is not None for block in model.blocks):
        return WHOLE  # factors that differ by channel let a mean be read behind them
    norm = model.get_submodule(norm_path(model, "ln_final"))
    if is_crms(model) or isinstance(getattr(norm, "map", None), CRMSNormMap):
        return COMPLETED
    return CENTRED if norm_at(model, "ln_final").centred else WHOLE


def _past(block: nn.Module) -> Float[Tensor, " d_model"] | None:
    """The factors of the stream that goes past a block; None for none."""
    scaler = getattr(block, "resid_scale", None)
    return None if scaler is None else scaler.gain.detach()


def _units(model: HookedTransformer) -> list[Float[Tensor, " d_model"] | int]:
    """The units of the stream before each block and after the last: what the factors of the blocks
    before multiply it by. A channel that ends keeps its unit."""
    units: list[Tensor | int] = [1]
    for block in model.blocks:
        past = _past(block)
        units.append(units[-1] if past is None else units[-1] * past.where(past != 0, 1.0))
    return units


@torch.no_grad()
def loss_without_blocks(
    model: HookedTransformer, text: Int[Tensor, "sequence pos"], batch: int = 4
) -> Float[Tensor, " layer"]:
    """What cross-entropy gains when a block is left out, [layer], in nats per token.

    Args:
        model: A `HookedTransformer` in any form.
        text: Token ids, [sequence, pos].
        batch: How many sequences run at once.
    """
    tokens = read_sequences(model, text, packed=True)
    losses = torch.cat([_left_out(model, chunk)[0] for chunk in batches(tokens, batch)], 1)
    mean = losses.mean(1)
    return mean[1:] - mean[0]


@torch.no_grad()
def _left_out(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "model target"], list[Float[Tensor, "batch pos d_model"]]]:
    """The losses of the model and of it without each block, and the stream at every place."""
    n_layers = model.cfg.n_layers
    last, streams = _streams(model, tokens)

    def losses(stream: Tensor, layer: int) -> Tensor:
        logits = run(model, stream, start_at_layer=layer)
        return next_token_loss(logits, tokens.to(logits.device), "none").double().cpu()

    rows = [losses(last, n_layers)]
    for layer, (stream, block) in enumerate(zip(streams, model.blocks, strict=True)):
        past = _past(block)
        rows.append(losses(stream if past is None else stream * past, layer + 1))
    return torch.stack(rows), [*streams, last]


def _streams(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_model"], list[Float[Tensor, "batch pos d_model"]]]:
    """The stream behind the last block, and before each; the first block's own hook on it is for
    the block to call."""
    places = [Place(layer).hook for layer in range(1, model.cfg.n_layers)]
    last, found = run_and_keep(model, tokens, places, model.cfg.n_layers)
    return last, [run(model, tokens, 0), *(found[place] for place in places)]


class _StreamSums:
    """Sums of what is measured of the stream, over batches."""

    def __init__(self, n_layers: int, seen: Seen):
        self.seen = seen
        self.variances = torch.zeros(2, n_layers + 1, dtype=torch.float64)  # first tokens, others
        self.counts = torch.zeros(2, dtype=torch.float64)
        self.angles = torch.zeros(n_layers + 1, n_layers + 1, dtype=torch.float64)

    def add(self, streams: list[Float[Tensor, "batch pos d_model"]]) -> None:
        streams = [self.seen.of(x.double().cpu()) for x in streams]
        variance = torch.stack([x.square().mean(-1) for x in streams])
        first, others = variance[..., 0], variance[..., 1:]
        self.variances += torch.stack([first.sum(1), others.sum((1, 2))])
        self.counts += torch.tensor([first[0].numel(), others[0].numel()])
        last = torch.stack([x[:, -1] for x in streams], 1)
        unit = last / last.norm(dim=-1, keepdim=True)
        pairs = unit[:, :, None], unit[:, None]
        # The arc cosine has no digits left at small angles.
        sine, cosine = (pairs[0] - pairs[1]).norm(dim=-1), (pairs[0] + pairs[1]).norm(dim=-1)
        self.angles += (2 * torch.atan2(sine, cosine) / torch.pi).sum(0)

    def read(self) -> dict[str, Tensor]:
        """Means, by the fields of the report."""
        first, others = self.variances / self.counts[:, None]
        angles = self.angles / self.counts[0]
        return {"variance": others, "variance_first": first, "angles": angles}


@torch.no_grad()
def _blocks(
    model: HookedTransformer,
    tokens: Int[Tensor, "prompt pos"],
    units: list[Float[Tensor, " d_model"] | int],
) -> Iterator[tuple[nn.Module, Float[Tensor, "prompt pos d_model"], Units]]:
    """Each block, the stream before it, and the stream's units before it and behind."""
    streams = _streams(model, tokens)[1]
    for block, resid, around in zip(model.blocks, streams, pairwise(units), strict=True):
        yield block, resid.to(next(block.parameters()).device), around
