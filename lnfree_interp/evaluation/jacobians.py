"""The Jacobian of what a block writes, by vector-Jacobian products; no such matrix is formed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Complex, Float
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigs
from torch import Tensor, nn

from lnfree_interp.models.maps import Vectors, centre

_TOLERANCE: Any = 1e-4
"""Of an eigenvalue, relative to the largest."""

Units = tuple[Float[Tensor, " d"] | int, Float[Tensor, " d"] | int]


@dataclass(frozen=True)
class Seen:
    """What norms see of a stream: a linear map S of it, with what a distance of Jacobians needs."""

    of: Callable[[Vectors], Vectors]
    """S."""
    back: Callable[[Vectors], Vectors]
    """The transpose of S."""
    behind: Callable[[Vectors], Vectors]
    """The transpose of S's pseudo-inverse."""
    more: int = 0
    """How many channels S adds."""


WHOLE = Seen(lambda x: x, lambda x: x, lambda x: x)
"""The stream as it is."""
CENTRED = Seen(centre, centre, lambda x: x)
"""The stream without its mean. A block does not read the mean, so that nothing is to be done on the
way in."""
COMPLETED = Seen(
    lambda x: torch.cat([x, -x.sum(-1, keepdim=True)], -1),
    lambda y: y[..., :-1] - y[..., -1:],
    lambda x: centre(torch.cat([x, torch.zeros_like(x[..., :1])], -1)),
    more=1,
)
"""The stream with the channel that makes its mean zero. (2305.14858)"""


class Written:
    """What a block writes at the last position, with its derivative by the stream there.

    With J the Jacobian of the stream behind the block by the one before it, both at the last
    position of a prompt, calling it multiplies with the transpose of J - I. That has the
    eigenvalues and the Frobenius norm of J - I.

    Args:
        block: The block.
        resid: The stream before it.
        units: The units of the stream before the block and behind it, in which it is measured.
    """

    def __init__(
        self, block: nn.Module, resid: Float[Tensor, "prompt pos d_model"], units: Units = (1, 1)
    ):
        before, behind = units
        with torch.enable_grad():
            self.last = (resid[:, -1] / before).detach().requires_grad_()
            last = self.last * before
            whole = torch.cat([resid[:, :-1].detach(), last[:, None]], 1)
            self.written = block(whole)[:, -1] / behind - self.last

    def __call__(self, vectors: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt d_model"]:
        """The transpose of J - I times a vector for each prompt."""
        (product,) = torch.autograd.grad(self.written, self.last, vectors, retain_graph=True)
        return product


def distance_from_identity(
    written: Written, vectors: int, seed: int, seen: Seen = WHOLE
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The root of the mean over prompts of ||J - I||_F^2 over the number of channels, and its
    standard error, of what norms see.

    The mean square of a product with a vector of random signs is the squared Frobenius norm.

    Args:
        written: What a block writes.
        vectors: The number of random vectors for each prompt.
        seed: Their seed.
        seen: What norms see of the stream.
    """
    generator, like = torch.Generator().manual_seed(seed), written.last
    prompts, channels = like.shape[0], like.shape[1] + seen.more
    squares = []
    for _ in range(vectors):
        signs = torch.randint(2, (prompts, channels), generator=generator).to(like) * 2 - 1
        product = seen.behind(written(seen.back(signs)))
        squares.append(product.double().square().sum(-1).cpu() / channels)
    each = torch.stack(squares)  # [vector, prompt]
    # Means of prompts spread with the vectors within them too; one prompt has its vectors alone.
    means = each.mean(0) if each.shape[1] > 1 else each[:, 0]
    error, root = means.std() / len(means) ** 0.5, each.mean().sqrt()
    return root, torch.where(root == 0, 0.0, error / (2 * root))


class _OfOnePrompt(LinearOperator):
    """The transpose of J - I at one prompt, for SciPy."""

    def __init__(self, written: Written):
        d_model = written.last.shape[1]
        super().__init__(np.dtype(np.float64), (d_model, d_model))
        self.written = written

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(np.asarray(x).reshape(1, -1)).to(self.written.last)
        return self.written(vector)[0].double().cpu().numpy()


def largest_eigenvalues(
    block: nn.Module,
    resid: Float[Tensor, "prompt pos d_model"],
    k: int,
    seed: int,
    units: Units = (1, 1),
) -> Complex[Tensor, "prompt eigenvalue"]:
    """The k eigenvalues of J - I with the largest absolute values, for each prompt.

    Args:
        block: The block.
        resid: The stream before it.
        k: How many; nan takes the place of those that the iteration did not find.
        seed: The seed of the vector that it starts from.
        units: As for `Written`.
    """
    prompts, _, d_model = resid.shape
    start = np.random.default_rng(seed).standard_normal(d_model)
    found = torch.full((prompts, k), torch.nan, dtype=torch.complex128)
    for prompt in range(prompts if k else 0):
        operator = _OfOnePrompt(Written(block, resid[prompt : prompt + 1], units))
        product = operator.matvec(start)
        if not np.isfinite(product).all():
            continue
        if not product.any():  # ARPACK refuses the zero matrix
            found[prompt] = 0
            continue
        try:
            values = eigs(operator, k, v0=start, tol=_TOLERANCE, return_eigenvectors=False)
        except ArpackNoConvergence as error:
            values = error.eigenvalues
        except ArpackError:
            continue
        values = np.asarray(values)
        values = values[np.argsort(-np.abs(values))][:k]
        found[prompt, : len(values)] = torch.from_numpy(values)
    return found
