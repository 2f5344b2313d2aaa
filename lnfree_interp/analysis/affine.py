"""The whole network, patterns and gates held, as one affine map from its tokens to a logit."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.contributions import Component, Contributions
from lnfree_interp.analysis.gaps import token_gap
from lnfree_interp.analysis.gates import HeldLayer, hold
from lnfree_interp.analysis.logit_reading import read_logit
from lnfree_interp.analysis.questions import Answer, Prompt
from lnfree_interp.analysis.reads import held


@dataclass(frozen=True, eq=False, repr=False)
class AffineMap:
    """A logit as sum over tokens of J_t (embedding + position), plus biases.

    Attributes:
        jacobian: [pos, d_model], J_t: what the logit reads from the stream before block 0, in
            logits per unit of the stream.
        contributions: `embed@t` and `pos_embed@t` for every token, then biases layer by layer, in
            logits.
    """

    jacobian: Float[Tensor, "pos d_model"]
    contributions: Contributions

    @property
    def by_token(self) -> Float[Tensor, " pos"]:
        """[pos], what each token adds, its position included, in logits."""
        found = [self.contributions.of_kind(kind) for kind in ("embed", "pos_embed")]
        return torch.stack([values for values in found if len(values)]).sum(0)

    @property
    def biases(self) -> Float[Tensor, ""]:
        """What does not come from any token, in logits."""
        return self.contributions.total - self.by_token.sum()

    @property
    def certificate(self) -> Certificate:
        """Tokens and biases against the model's logit."""
        return self.contributions.certificate

    def verify(self, tolerance: float | None = None) -> "AffineMap":
        """Return self if tokens and biases add up to the logit.

        Args:
            tolerance: As in `Contributions.verify`.

        Raises:
            InexactError: if they do not.
        """
        self.certificate.require(tolerance)
        return self

    def __repr__(self) -> str:
        return (
            f"AffineMap({len(self.jacobian)} tokens, of the logit {self.by_token.sum().item():+.3f}"
            f" from tokens and {self.biases.item():+.3f} from biases, "
            f"error {self.contributions.error})"
        )


@torch.no_grad()
def affine_map(
    model: HookedTransformer,
    prompt: Prompt,
    answer: Answer,
    against: Answer | None = None,
    *,
    prepend_bos: bool | None = None,
    frozen_scale: bool = False,
) -> AffineMap:
    """What each input token adds to a logit, with attention patterns and neuron gates held.

    What is held is named: patterns, gates, and no norm. Biases, which are no token's, stand apart:
    they are often a large share. (Detached Jacobians hold norms as well: identities only.)

    Args:
        model: LN-free.
        prompt: One prompt.
        answer: As in `attribute_logits`, one.
        against: As in `attribute_logits`, one.
        prepend_bos: As in `attribute_logits`.
        frozen_scale: Hold live norms' scales too; `contributions.gap` measures what that misses,
            by taking out the tokens that claim most, patterns and gates still held.

    Returns:
        What each token adds, [pos], and biases, in logits; with the Jacobian, [pos, d_model].

    Raises:
        InexactError: if a norm is live or the logits are capped, and `frozen_scale` is False.
        DataError: as `attribute_logits`, and for more than one prompt or answer.
        UnsupportedModelError: as `attribute_logits`.

    Source:
        Ours: with patterns given the logit is a sum over tokens in an attention-only model (Elhage
        et al. 2021, https://transformer-circuits.pub/2021/framework); each neuron's secant
        post / pre carries that through MLPs.

    Examples:
        >>> tokens_add = lf.affine_map(free, "for i in", " range").verify()
        >>> tokens_add.by_token.shape, tokens_add.jacobian.shape
        (torch.Size([4]), torch.Size([4, 192]))
        >>> tokens_add.contributions.labels[-4:]
        ['3_b_O', '3_b_in', '3_b_out', 'b_U']
    """
    nonlinear = held(model, frozen_scale)
    reading = read_logit(model, prompt, answer, against, prepend_bos)
    network = hold(model, reading.tokens)
    values: list[Tensor] = []
    components: list[Component] = []
    u = start = reading.spread(network.streams[-1])
    biases: list[tuple[Component, Tensor]] = []
    for layer, behind, at_attn, before in network.back(start):
        biases += layer_biases(layer, behind, at_attn)
        u = before
    for kind, x in network.embeds.items():
        values.append(torch.linalg.vecdot(x, u)[0])
        components += [Component(kind, pos=pos) for pos in range(x.shape[1])]
    biases = [*reversed(biases), *reading.constants]
    values.append(torch.stack([value for _, value in biases]))
    components += [component for component, _ in biases]
    contributions = Contributions(
        torch.cat(values), tuple(components), reading.total, "token", reading.of, reading.prompts,
        bool(nonlinear), "tokens + biases = the model's logits, patterns and gates held",
        token_gap(model, network, reading) if nonlinear else None,
    )  # fmt: skip
    return AffineMap(u[0], contributions)


def layer_biases(
    layer: HeldLayer, behind: Tensor, at_attn: Tensor
) -> list[tuple[Component, Tensor]]:
    """What a block's biases add, the last of them first."""
    found = []
    if layer.mlp is not None:
        b_in = (layer.mlp.onto_post(behind) * layer.mlp.b_in).sum()
        found.append((Component("b_out", layer.layer), (behind @ layer.mlp.b_out).sum()))
        found.append((Component("b_in", layer.layer), b_in))
    found.append((Component("b_O", layer.layer), (at_attn @ layer.b_O).sum()))
    found.append((Component("b_V", layer.layer), (layer.onto_z(at_attn) * layer.b_V).sum()))
    return found
