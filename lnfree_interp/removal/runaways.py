"""Tokens that run away in a model whose norms are frozen, and the norms that would hold them."""

from collections.abc import Iterable

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
_COMPARED = 3


def runs_away_at(
    model: HookedTransformer, tokens: Int[Tensor, "sequence pos"]
) -> Int[Tensor, " sequence"]:
    """The first site at which a sequence has a token that is far too large, or not finite.

    Args:
        model: With norm sites.
        tokens: [sequence, pos].

    Returns:
        Numbers in `list_norm_sites(model)`; how many sites there are where no token runs away. A
        live norm bears any token, but for one that is not finite behind the last block.
    """
    sites = list_norm_sites(model)
    norms = [get_norm(model, site) for site in sites]
    frozen = {f"{s}.hook_in": n for n, s in enumerate(sites) if norms[n].frozen}
    found: dict[int, Bool[Tensor, " sequence"]] = {}

    def look(x: Float[Tensor, "batch pos *head d"], hook: HookPoint) -> None:
        site = frozen[str(hook.name)]
        own = norms[site].first is not None
        ratio = norms[site].token_sigma(x)[:, own:].flatten(1) / norms[site].constant
        found[site] = ~(ratio <= FAR).all(1)

    rows = []
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, look) for name in frozen]):
        for batch in tokens.to(model.W_E.device).split(_AT_ONCE):
            found.clear()
            final = model(batch, stop_at_layer=model.cfg.n_layers)
            model.ln_final(final)  # which is a site too
            last = len(norms) - 1
            found[last] = ~final.isfinite().flatten(1).all(1) | found.get(last, False)
            first = torch.full((len(batch),), len(norms), device=final.device)
            for site, bad in found.items():
                first[bad] = first[bad].clamp(max=site)
            rows.append(first)
    return torch.cat(rows).cpu()


def thaw_runaways(
    model: HookedTransformer, *texts: Int[Tensor, "_sequence _pos"], progress: bool = True
) -> tuple[NormSite, ...]:
    """Make norms live again, one after the other, until no token of some texts runs away.

    Each time it is the norm with which the fewest sequences have such a token, and of equal ones
    that with which they have it latest in the model. Norms before the MLPs come first: an MLP is
    what answers to a large token with a larger one. A norm that turns out to be needless, once the
    others are live, stays frozen.

    Args:
        model: With norm sites; it is changed.
        texts: Each [sequence, pos]; they may have other lengths.
        progress: Whether to show a progress bar.

    Returns:
        The sites that are live again, in the order in which they were chosen; none if no token runs
        away.

    Raises:
        TrainingError: if a token is not finite with all norms live. The model is as it was.

    Source:
        Ours.

    Examples:
        >>> sited = lf.with_norm_sites(model)
        >>> lf.freeze_site(sited, "ln_final", sigma=2.0)
        >>> lf.thaw_runaways(sited, tokens, progress=False)
        ()
    """
    sites = list_norm_sites(model)
    frozen = [site for site in sites if get_norm(model, site).frozen]

    def at(some: Iterable[Tensor], live: Iterable[NormSite]) -> list[Int[Tensor, " _sequence"]]:
        norms = [get_norm(model, site) for site in live]
        with restored(norms):
            for norm in norms:
                norm.thaw()
            return [runs_away_at(model, tokens) for tokens in some if len(tokens)]

    def bad(found: list[Int[Tensor, " _sequence"]]) -> Bool[Tensor, " all"]:
        return torch.cat(found) < len(sites)

    def late(found: list[Int[Tensor, " _sequence"]]) -> tuple[int, int]:
        where = torch.cat(found)
        return int((where == len(sites)).sum()), int(where.sum())

    texts = tuple(tokens for tokens in texts if len(tokens))
    if not texts or not bad(found := at(texts, ())).any():
        return ()
    if broken := int(bad(at(texts, frozen)).sum()):
        raise TrainingError(
            f"{broken} of {sum(map(len, texts))} sequences are not finite, with all norms live "
            "too: the model is broken, and no norm holds it. Go on from an earlier checkpoint"
        )
    chosen: list[NormSite] = []
    while n := int(bad(found).sum()):
        worst = [
            tokens[where < len(sites)][:_LOOKED_AT]
            for tokens, where in zip(texts, found, strict=True)
        ]
        latest = int(torch.cat(found)[bad(found)].max())
        left = [site for site in sites[: latest + 1] if site in frozen and site not in chosen]
        left = [site for site in left if site.kind == "ln2"] or left
        what, helps = f"norms to keep: {len(chosen)}, {n} runaways", {}
        for site in tqdm(left, desc=what, unit="site", disable=not progress):
            helps[site] = late(at(worst, [*chosen, site]))
        # What helps these may let tokens of other sequences run away.
        best = sorted(left, key=lambda site: helps[site], reverse=True)[:_COMPARED]
        outcomes = {site: at(texts, [*chosen, site]) for site in best}
        chosen.append(max(best, key=lambda site: late(outcomes[site])))
        found = outcomes[chosen[-1]]
    for site in tuple(chosen[:-1]):
        fewer = [other for other in chosen if other != site]
        if not bad(at(texts, fewer)).any():
            chosen = fewer
    for site in chosen:
        get_norm(model, site).thaw()
    return tuple(chosen)
