"""Tokens that run away in a model whose norms are frozen, and the norms that would hold them."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from lnfree_interp.errors import TrainingError
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.models.sites import get_norm, list_norm_sites
from lnfree_interp.removal.freezing import restored

FAR = 1000.0
"""A token has run away where its scale is so many times what it is divided by: it is about to
overflow. Smaller ones may do no harm."""

_AT_ONCE = 4
_LOOKED_AT = 8


def running_away(
    model: HookedTransformer, tokens: Int[Tensor, "sequence pos"]
) -> Bool[Tensor, " sequence"]:
    """Which sequences have a token that is far too large at a frozen site, or not finite.

    Args:
        model: With norm sites.
        tokens: [sequence, pos].
    """
    norms = {str(site): get_norm(model, site) for site in list_norm_sites(model)}
    frozen = {name: norm for name, norm in norms.items() if norm.frozen}
    found: list[Tensor] = []

    def look(x: Float[Tensor, "batch pos *head d"], hook: HookPoint) -> None:
        norm = frozen[str(hook.name).removesuffix(".hook_in")]
        own = norm.first is not None
        ratio = norm.token_sigma(x)[:, own:].flatten(1) / norm.constant
        found.append(~(ratio <= FAR).all(1))

    rows = []
    with torch.no_grad(), model.hooks(fwd_hooks=[(f"{name}.hook_in", look) for name in frozen]):
        for batch in tokens.to(model.W_E.device).split(_AT_ONCE):
            found.clear()
            final = model(batch, stop_at_layer=model.cfg.n_layers)
            model.ln_final(final)  # which is a site too
            found.append(~final.isfinite().flatten(1).all(1))
            rows.append(torch.stack(found).any(0))
    return torch.cat(rows).cpu()


def hold_runaways(
    model: HookedTransformer, tokens: Int[Tensor, "sequence pos"], *, progress: bool = True
) -> tuple[NormSite, ...]:
    """Make norms live again, one after the other, until no token of a text runs away.

    Each time it is the norm with which the fewest sequences have such a token; of those before the
    MLPs, if there are any: an MLP is what answers to a large token with a larger one.

    Args:
        model: With norm sites; it is changed.
        tokens: [sequence, pos], the text.
        progress: Whether to show a progress bar.

    Returns:
        The sites that are live again, in the order in which they were chosen; none if no token runs
        away.

    Raises:
        TrainingError: if there is no norm that helps. The model is as it was.

    Source:
        Ours.

    Examples:
        >>> sited = lf.with_norm_sites(model)
        >>> lf.freeze_site(sited, "ln_final", sigma=2.0)
        >>> lf.hold_runaways(sited, tokens, progress=False)
        ()
    """
    norms = {site: get_norm(model, site) for site in list_norm_sites(model)}
    chosen: list[NormSite] = []
    with restored(norms.values()):
        while (bad := running_away(model, tokens)).any():
            frozen = [site for site, norm in norms.items() if norm.frozen]
            frozen = [site for site in frozen if site.kind == "ln2"] or frozen
            worst, left = tokens[bad][:_LOOKED_AT], {}
            for site in tqdm(frozen, desc="norms to keep", unit="site", disable=not progress):
                with restored([norms[site]]):
                    norms[site].thaw()
                    left[site] = int(running_away(model, worst).sum())
            if min(left.values(), default=len(worst)) == len(worst):
                raise TrainingError(
                    f"in {int(bad.sum())} of {len(bad)} sequences a token runs away, and there is "
                    "no norm that holds it when it is live again: train for more steps"
                )
            chosen.append(min(left, key=lambda site: left[site]))
            norms[chosen[-1]].thaw()
    for site in chosen:
        norms[site].thaw()
    return tuple(chosen)
