"""The logit lens: what the unembedding reads from the stream at every layer.

With a live final norm the lens at a layer rescales everything by that layer's own norm, and the
steps from layer to layer are no attribution. Without, each step is exactly what the block added:
lens(l + 1) - lens(l) is block l's direct logit attribution.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.logit_reading import target_logits
from lnfree_interp.analysis.logits import attribute_next_tokens
from lnfree_interp.analysis.questions import read_blocks, strings
from lnfree_interp.analysis.reads import held
from lnfree_interp.analysis.writes import Place
from lnfree_interp.models.running import run_and_keep
from lnfree_interp.numerics import measure_error


@dataclass(frozen=True, eq=False, repr=False)
class Lens:
    """The logit of the true next token, as it builds up.

    Attributes:
        values: [layer + 1, batch, pos - 1], in logits; the first row is before block 0, the last
            the logit.
        increments: [layer, batch, pos - 1], what each block added, in logits.
        top: [layer + 1, batch, pos - 1], the id of the token that would be predicted there.
        tokens: The prompts, as strings.
        names: Each token of `top`, as a string.
        certificate: Steps of the lens against direct attribution by layer.
    """

    values: Float[Tensor, "place batch target"]
    top: Int[Tensor, "place batch target"]
    tokens: tuple[tuple[str, ...], ...]
    names: Mapping[int, str]
    certificate: Certificate

    @property
    def increments(self) -> Float[Tensor, "layer batch target"]:
        """[layer, batch, pos - 1], what each block added, in logits."""
        return self.values.diff(dim=0)

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.values.shape))
        return f"Lens(values [{shape}], {self.certificate})"

    def verify(self, tolerance: float | None = None) -> "Lens":
        """Return self if the steps are the blocks' attributions.

        Args:
            tolerance: As in `Contributions.verify`.

        Raises:
            InexactError: if they are not.
        """
        self.certificate.require(tolerance)
        return self


@torch.no_grad()
def logit_lens(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], *, frozen_scale: bool = False
) -> Lens:
    """The stream at every layer through the final norm and the unembedding.

    Read at the logit of the true next token, at every position but the last.

    Args:
        model: LN-free; or any, with `frozen_scale`, for the certificate that fails.
        tokens: [batch, pos].
        frozen_scale: Answer for a live final norm too. Each layer is then divided by its own
            scale, as logit lenses are, and the certificate shows that steps are no attribution.

    Returns:
        Values [layer + 1, batch, pos - 1], in logits; the first row is before block 0.

    Raises:
        InexactError: if the final norm is live or the logits are capped, and `frozen_scale` is
            False.
        DataError, UnsupportedModelError: as `attribute_next_tokens`.

    Source:
        nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru. Ours: that its
        steps are attributions, which needs a model without a live final norm.

    Examples:
        >>> lens = lf.logit_lens(free, tokens).verify()
        >>> lens.values.shape
        torch.Size([5, 4, 63])
        >>> lens.increments.shape
        torch.Size([4, 4, 63])
    """
    held(model, frozen_scale, ["ln_final"])
    tokens = read_blocks(model, tokens)
    by_layer = attribute_next_tokens(model, tokens, by="layer", frozen_scale=frozen_scale)
    n_layers = model.cfg.n_layers
    hooks = [Place(layer).hook for layer in range(n_layers + 1)]
    _, cache = run_and_keep(model, tokens, hooks, n_layers)
    found = [target_logits(model, cache[hook][:, :-1], tokens[:, 1:]) for hook in hooks]
    lens, top = (torch.stack(each) for each in zip(*found, strict=True))
    largest = max(by_layer.values.abs().max().item(), lens.abs().max().item())
    error = measure_error(lens.diff(dim=0), by_layer.of_kind("layer"), largest)
    ids = top.unique().tolist()
    return Lens(
        lens, top, tuple(tuple(strings(model, row.tolist())) for row in tokens),
        dict(zip(ids, strings(model, ids), strict=True)),
        Certificate("lens(l + 1) - lens(l) = attribution of block l", error),
    )  # fmt: skip
