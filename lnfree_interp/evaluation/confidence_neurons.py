"""Confidence neurons, which set how sure a model is but not which token it predicts.

A neuron of the last MLP that writes where the unembedding hardly reads can act only through the
final norm, by making the stream longer (Stolfo et al., 2406.16254). Without that norm it can hardly
act: 2507.02559 finds that mean-ablating such neurons no longer has an effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.logit_targets import POSITIONS
from lnfree_interp.analysis.prompts import batches, read_sequences
from lnfree_interp.analysis.targets import require_mlp
from lnfree_interp.analysis.view import View, view_of
from lnfree_interp.errors import DataError
from lnfree_interp.models.loss import entropy_of, loss_of
from lnfree_interp.numerics import wide

_NEURONS = 1024
"""How many neurons have their cosines with the whole vocabulary in memory at once."""


@torch.no_grad()
def confidence_scores(model: HookedTransformer) -> Float[Tensor, " neuron"]:
    """The score of each neuron of the last MLP: the norm of its output weights over the variance of
    their cosines with the unembedding.

    It is |w_out| / var_v cos(w_out, W_U[:, v]), from 2507.02559. The unembedding includes the final
    norm's gain and centring, so that a model and its LN-free version have comparable scores.

    Raises:
        DataError: for a model without MLPs.
        UnsupportedModelError: for a model with norms behind its MLPs.
    """
    view = view_of(model)
    final = view.read("ln_final", torch.ones(1))  # a scale does not change cosines
    W_U = torch.nn.functional.normalize(wide(final.weights_back(view.W_U)), dim=0)
    W_out = wide(view.mlp(require_mlp(view, view.n_layers - 1)).W_out)
    outputs = torch.nn.functional.normalize(W_out, dim=1)
    spread = torch.cat([(some @ W_U).var(dim=1) for some in outputs.split(_NEURONS)])
    return (W_out.norm(dim=1) / spread).nan_to_num(0.0)  # the score of a dead neuron is 0


def find_confidence_neurons(model: HookedTransformer, k: int = 3) -> list[int]:
    """The k neurons of the last MLP with the highest score |w_out| / var_v cos(w_out, W_U[:, v]).

    Such a neuron writes much, but favours no token in particular. The unembedding includes the
    final norm's gain and centring, so that a model and its LN-free version have comparable scores.

    Args:
        model: A model with MLPs, LN-free or not.
        k: How many neurons to find, at most as many as the MLP has.

    Returns:
        Indices of neurons of the last MLP, the highest score first.

    Raises:
        DataError: for a model without MLPs, or with fewer than `k` neurons.
        UnsupportedModelError: for a model with norms behind its MLPs, or whose stream is not the
            plain sum of its parts.

    Source:
        arXiv 2406.16254 describes such neurons; the score is that of arXiv 2507.02559.

    Examples:
        >>> neurons = lf.find_confidence_neurons(model, k=3)
        >>> len(neurons)
        3
    """
    scores = confidence_scores(model)
    if not 0 < k <= len(scores):
        raise DataError(
            f"the last MLP has {len(scores)} neurons, not {k}: give k from 1 to that number"
        )
    return scores.topk(k).indices.tolist()


@dataclass(frozen=True, eq=False)
class NeuronAblation:
    """What setting neurons of the last MLP to their mean does to the predicted next token."""

    neurons: tuple[int, ...]
    """Indices of neurons of the last MLP, in the order of `loss_change`."""
    loss_change: Float[Tensor, "which sequence target"]
    """[which, sequence, target], the change of the loss in nats: for each neuron, then for all
    together."""
    entropy_change: Float[Tensor, "which sequence target"]
    """[which, sequence, target], the change of the predicted distribution's entropy in nats, in the
    same order."""
    entropy: float
    """The mean entropy over targets without ablation, in nats."""

    @property
    def median_loss_change(self) -> Float[Tensor, " which"]:
        """The median of the absolute change of the loss, which 2507.02559 reports."""
        return self.loss_change.flatten(1).abs().median(1).values

    @property
    def median_entropy_change(self) -> Float[Tensor, " which"]:
        """The median of the absolute change of the entropy, which 2507.02559 reports."""
        return self.entropy_change.flatten(1).abs().median(1).values

    @property
    def total_entropy_change(self) -> float:
        """The change of the mean entropy with all neurons ablated, as a fraction of that mean."""
        return self.entropy_change[-1].mean().item() / self.entropy


@torch.no_grad()
def ablate_neurons(
    model: HookedTransformer,
    tokens: Int[Tensor, "sequence pos"],
    neurons: Sequence[int],
    batch: int = 4,
) -> NeuronAblation:
    """Set neurons of the last MLP to their mean over the text, one by one and all together.

    Args:
        model: A model with MLPs, LN-free or not.
        tokens: Token ids, [sequence, pos].
        neurons: Indices of neurons of the last MLP, such as `find_confidence_neurons(model)`.
        batch: How many sequences run at once.

    Returns:
        A `NeuronAblation` with changes of loss and entropy in nats,
            [each neuron and all, sequence, target].

    Raises:
        DataError: if there is no such neuron, the model has no MLPs, or it cannot read the tokens.
        UnsupportedModelError: as for `find_confidence_neurons`.

    Source:
        arXiv 2406.16254 (mean ablation); the medians of absolute changes are those of arXiv
        2507.02559.

    Examples:
        >>> neurons = lf.find_confidence_neurons(model, k=2)
        >>> ablation = lf.ablate_neurons(model, tokens, neurons)
        >>> ablation.entropy_change.shape
        torch.Size([3, 4, 63])
    """
    view, tokens = view_of(model), read_sequences(model, tokens, packed=True)
    last = require_mlp(view, view.n_layers - 1)
    W_out = view.mlp(last).W_out
    wrong = [neuron for neuron in neurons if not 0 <= neuron < len(W_out)]
    if wrong or not neurons:
        raise DataError(
            f"the last MLP has neurons 0 to {len(W_out) - 1}, not {wrong}: give one or more of them"
        )
    post_hook = get_act_name("post", last)
    chosen = torch.tensor(list(neurons), device=W_out.device)
    streams, posts = [], []
    for chunk in batches(tokens, batch):
        stream, found = view.run(chunk, [post_hook])
        streams.append(stream)
        posts.append(found[post_hook][..., chosen])
    stream, post = torch.cat(streams), torch.cat(posts)
    moved = post.mean((0, 1)) - post
    changes = [moved[..., [i]] @ W_out[chosen[[i]]] for i in range(len(chosen))]
    changes.append(moved @ W_out[chosen])
    before = _predict(view, stream, tokens)
    after = [_predict(view, stream + change, tokens) for change in changes]
    loss, entropy = (
        torch.stack([one[which] - before[which] for one in after]) for which in range(2)
    )
    return NeuronAblation(tuple(neurons), loss, entropy, before[1].double().mean().item())


def _predict(
    view: View, stream: Float[Tensor, "sequence pos d_model"], tokens: Tensor
) -> tuple[Float[Tensor, "sequence target"], Float[Tensor, "sequence target"]]:
    """The loss and the entropy of the prediction of every next token."""
    losses, entropies = [], []
    kept, wanted = stream[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    position = torch.arange(stream.shape[1] - 1, device=stream.device)
    firsts = (position == 0).expand(len(stream), -1).flatten()
    pieces = (x.split(POSITIONS) for x in (kept, wanted, firsts))
    for some, targets, first in zip(*pieces, strict=True):
        log_p = wide(view.logits(some[None], first=first[None])[0][0]).log_softmax(-1)
        losses.append(loss_of(log_p, targets).cpu())
        entropies.append(entropy_of(log_p).cpu())
    shape = (len(stream), -1)
    return torch.cat(losses).reshape(shape), torch.cat(entropies).reshape(shape)
