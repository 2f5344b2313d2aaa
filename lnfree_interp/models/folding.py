"""Frozen norms merged into the weights that read them: a stock model without norms.

For a frozen norm with gain w, bias b and constant sigma, and a reader W, b_W of its output
(W_Q, W_K, W_V behind ln1; W_in behind ln2; W_U behind ln_final), with C = I - 11^T/d:

    (((x C) / sigma) * w + b) W + b_W  =  x [C diag(w / sigma) W]  +  [b_W + b W]

Exact in real arithmetic, on every input. No weight that writes to the residual stream changes, so
its activations are those of the frozen model. (2409.13710; the algebra is in the documentation.)
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.errors import NormSiteError
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.construct import hooked_transformer
from lnfree_interp.models.norms import Norm
from lnfree_interp.models.sites import get_norm, has_norm_sites, live_sites


def _fold_reader(
    norm: Norm,
    W: Float[Tensor, "*head d_model out"],
    b: Float[Tensor, "*head out"],
) -> tuple[Float[Tensor, "*head d_model out"], Float[Tensor, "*head out"]]:
    """Weight and bias that do on the norm's input what W, b do on its output, in W's dtype."""
    # In float64: the only rounding left is the last one, back to the model's dtype.
    W64, gain, bias = W.double(), norm.w.double() / norm.sigma.double(), norm.b.double()
    scaled = gain[:, None] * W64
    centred = scaled - scaled.mean(-2, keepdim=True)
    return centred.to(W.dtype), (b.double() + bias @ W64).to(b.dtype)


def fold(model: HookedTransformer) -> HookedTransformer:
    """The same function as a stock `HookedTransformer` with `normalization_type=None`.

    Args:
        model: A model whose norm sites are all frozen, such as `remove_norms(...).model`.

    Returns:
        A new model with no class of this package in it. Its logits have been compared with the
        frozen model's on random tokens; `compare_logits` gives the number.

    Raises:
        NormSiteError: if a site is still live, or there are no sites to fold.
        InexactError: if the logits differ by more than rounding in the model's dtype explains.
    """
    if not has_norm_sites(model):
        raise NormSiteError(
            "nothing to fold: the model has no frozen norm sites; remove_norms(...).model has"
        )
    if live := live_sites(model):
        names = ", ".join(map(str, live[:4])) + (", ..." if len(live) > 4 else "")
        raise NormSiteError(f"{len(live)} norm sites are still live and cannot be folded: {names}")

    state = {k: v for k, v in model.state_dict().items() if ".ln" not in k and "ln_final" not in k}

    def fold_into(norm: Norm, prefix: str, reader: str) -> None:
        W, b = f"{prefix}W_{reader}", f"{prefix}b_{reader}"
        state[W], state[b] = _fold_reader(norm, state[W], state[b])

    state.pop("unembed.W_E", None)  # present when tied
    state["unembed.W_U"] = model.W_U.detach()
    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}"
        for reader, kind in (("Q", "ln1.qk"), ("K", "ln1.qk"), ("V", "ln1.v")):
            fold_into(get_norm(model, f"{block}.{kind}"), f"{block}.attn.", reader)
        fold_into(get_norm(model, f"{block}.ln2"), f"{block}.mlp.", "in")
    fold_into(get_norm(model, "ln_final"), "unembed.", "U")

    cfg = replace(model.cfg, normalization_type=None)
    folded = hooked_transformer(cfg, state, model.tokenizer)
    compare_logits(folded, model).require("folded against frozen logits")
    return folded
