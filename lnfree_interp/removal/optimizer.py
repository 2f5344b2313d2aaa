"""The optimiser of a run, and what it trains."""

import torch
from transformer_lens import HookedTransformer

from lnfree_interp.checkpoints.architectures import ARCHITECTURES
from lnfree_interp.checkpoints.layouts import hooked_names, optional_names
from lnfree_interp.models.inserting import varied
from lnfree_interp.models.site_names import stock_name
from lnfree_interp.models.sites import list_norm_sites, list_scalers
from lnfree_interp.removal.recipe import Recipe


def adamw(model: HookedTransformer, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings only.

    The names decide, because TransformerLens' b_Q is a matrix by its shape. Parameters that the
    architecture in transformers does not have, such as a Llama's biases, are not trained: they
    could not be exported.
    """
    foreign = _foreign(model)
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if name in foreign:
            parameter.requires_grad_(False)
        # Fused AdamW goes through weights and moments side by side in memory, and moments that come
        # from a checkpoint are contiguous.
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        if parameter.requires_grad:
            leaf = name.rpartition(".")[2].lstrip("_")
            (decayed if leaf.startswith("W_") else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def _foreign(model: HookedTransformer) -> set[str]:
    """Parameters that the model's class in transformers lacks; none if the class is not known."""
    architecture = ARCHITECTURES.get(model.cfg.original_architecture or "")
    if architecture is None:
        return set()
    parameters = dict(model.named_parameters())
    optional = optional_names(architecture.layout, model.cfg)
    switched = {ours for names in optional.values() for ours in names}
    places = hooked_names(architecture.layout, model.cfg)
    if varied(model):  # no class of transformers holds it: what its norms learn is all its own
        own = (*map(str, list_norm_sites(model)), *list_scalers(model))
        places = places | {stock_name(n) for n in parameters if n.startswith(own)}
    if not any(parameters[name].any() for name in switched):
        places = places - switched
    return {name for name in parameters if stock_name(name) not in places}
