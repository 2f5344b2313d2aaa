"""An LN-free model as weights of a class of transformers that always normalises.

An epsilon of 1e12 and gains of 1e6 make every norm subtract the mean and multiply by a constant
(ApolloResearch/gpt2_noLN). Folded readers ignore the mean, so nothing changes.

The unembedding of a folded model is not the embedding any more. Where it is C diag(a) W_E^T, with a
bias beta W_E^T, it is tied again, and a and beta go into ln_f, as in the published checkpoints.
Otherwise the bias, for which the class has no parameter, goes into the direction that centring has
emptied: with s in every entry of ln_f's bias and b_U / (s d_model) added to every row of W_U, the
output x + s of ln_f reads

    (x + s 1) (W_U + 1 b_U / (s d))  =  x W_U + b_U        since  x 1 = 0  and  1 W_U = 0
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.checkpoints.architectures import Architecture
from lnfree_interp.checkpoints.published import CONSTANT_GAIN
from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.models.folding import rescale_queries_and_keys
from lnfree_interp.models.forms import constant_norms, reads_mean
from lnfree_interp.models.norm_map import NormMap
from lnfree_interp.models.site_names import whole_norm
from lnfree_interp.models.sites import has_norm_sites
from lnfree_interp.numerics import ROUNDING


def is_tied(
    W: Float[Tensor, "d_vocab d_model"],
    W_E: Float[Tensor, "d_vocab d_model"],
    architecture: Architecture,
) -> bool:
    """Whether an unembedding is the embedding; to rounding where that is a multiple of it."""
    if not architecture.scales_embedding:
        return torch.equal(W, W_E)
    few_ulp = 4 * torch.finfo(W.dtype).eps
    return torch.allclose(W * W_E.shape[1] ** 0.5, W_E, rtol=few_ulp, atol=0)


def constant_epsilon_weights(
    model: HookedTransformer, architecture: Architecture, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of an LN-free model with constant norms that transformers can run."""
    cfg, name = model.cfg, model.cfg.original_architecture
    if architecture.fixed_epsilon:
        raise UnsupportedModelError(
            f"{name} has its epsilon in the code, not in the config: an LN-free model cannot be "
            "exported to it; use target='transformer_lens'"
        )
    if cfg.dtype == torch.float16:
        raise UnsupportedModelError(
            "the exported gains are 1e6, which float16 cannot hold: use float32"
        )
    norms = constant_norms(model)
    sites = has_norm_sites(model)  # then gains and biases are still in the norms
    if architecture.centres and not sites and (reader := reads_mean(model)):
        raise UnsupportedModelError(
            f"{reader} reads the mean of the residual stream, which {name}'s LayerNorm subtracts: "
            "only models folded from LayerNorm can be exported to it"
        )
    weights = {key: W for key, W in weights.items() if not key.startswith("ln_final.")}
    for layer in range(cfg.n_layers):
        qk, v = (norms[f"blocks.{layer}.ln1.{half}"] for half in ("qk", "v"))
        assert qk.scale is not None
        assert v.scale is not None
        if qk.scale != v.scale:
            ratio = v.scale / qk.scale
            rescale_queries_and_keys(weights, f"blocks.{layer}", ratio, v.bias)
    # Of the two halves of ln1 the values' comes last, and stays.
    placed = {whole_norm(site): norm for site, norm in norms.items()}
    if not sites:
        final, weights["unembed.W_U"] = _unembedding(model, norms["ln_final"], architecture)
        placed["ln_final"] = final
    elif model.b_U.any():
        raise UnsupportedModelError(
            f"{name} has no unembedding bias, and this model has one: fold the model first"
        )
    nothing = NormMap(centred=False, statistic=None, scale=1.0)
    for parameter, length in architecture.norm_weights(cfg).items():
        norm_name, _, leaf = parameter.rpartition(".")
        norm = placed.get(norm_name, nothing)
        bias = 0.0 if norm.bias is None else norm.bias.detach()
        value = norm.multiplier * CONSTANT_GAIN if leaf == "w" else torch.as_tensor(bias)
        weights[parameter] = value.to(weights["embed.W_E"]).expand(length)
    return weights


def _unembedding(
    model: HookedTransformer, final: NormMap, architecture: Architecture
) -> tuple[NormMap, Float[Tensor, "d_model d_vocab"]]:
    """The final norm and W_U of a model whose final norm is folded: tied if that is exact."""
    scale = final.multiplier.item()  # 1 / sigma in the frozen form, 1 in the folded
    W_E = model.W_E / (model.cfg.d_model**0.5 if architecture.scales_embedding else 1)
    tie = retied(W_E, model.W_U * scale, model.b_U, architecture.centres)
    if tie is not None:
        gain, bias = tie
        return replace(final, scale=1.0, factor=1.0, gain=gain, bias=bias), W_E.T
    if not model.b_U.any():
        return final, model.W_U.detach()
    if not architecture.centres:
        raise UnsupportedModelError(
            f"{model.cfg.original_architecture} has no unembedding bias; this model has"
        )
    # A bias of the size of the gain keeps the added rows at the size of W_U.
    bias = torch.full_like(model.W_E[0], scale, dtype=torch.float64)
    W_U = model.W_U.double() + model.b_U.double() / (scale * model.cfg.d_model)
    return replace(final, bias=bias), W_U.to(model.W_U.dtype).detach()


def retied(
    W_E: Float[Tensor, "d_vocab d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"],
    centred: bool,
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"] | None] | None:
    """Gain a and bias beta with W_U = C diag(a) W_E^T and b_U = W_E beta, if there are any.

    The least squares solution, in float64; None unless it reproduces W_U and b_U to rounding.

    Args:
        W_E: Embedding.
        W_U: Unembedding behind a norm without gain and bias.
        b_U: Its bias.
        centred: Whether C subtracts the mean (LayerNorm), or is the identity (RMSNorm).
    """
    E, U, d = W_E.detach().double(), W_U.detach().double(), W_E.shape[1]
    tolerance = ROUNDING[W_E.dtype]
    gram = E.T @ E
    C = torch.eye(d, dtype=E.dtype, device=E.device)
    if centred:
        C -= 1 / d
    try:
        gain = torch.linalg.solve(gram * C, (U * E.T).sum(-1))
        bias = torch.linalg.solve(gram, E.T @ b_U.detach().double()) if b_U.any() else None
    except torch.linalg.LinAlgError:
        return None
    if not centred and bias is not None:
        return None  # RMSNorm has no bias
    for start in range(0, len(E), 4096):
        rows = slice(start, start + 4096)
        scaled = E[rows] * gain
        if centred:
            scaled = scaled - scaled.mean(-1, keepdim=True)
        if (scaled - U[:, rows].T).abs().max() > tolerance * U.abs().max():
            return None
    if bias is not None and (E @ bias - b_U.double()).abs().max() > tolerance * b_U.abs().max():
        return None
    return gain, bias
