"""Which parameters a run trains, by the names of components."""

import difflib
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from lnfree_interp.checkpoints.architectures import ARCHITECTURES
from lnfree_interp.checkpoints.layouts import hooked_names, optional_names
from lnfree_interp.errors import RecipeError
from lnfree_interp.models.inserting import varied
from lnfree_interp.models.site_names import stock_name, whole_norm
from lnfree_interp.models.sites import (
    has_norm_sites,
    list_norm_sites,
    list_scalers,
    with_norm_sites,
)
from lnfree_interp.models.weight_components import WeightComponent, list_weight_components
from lnfree_interp.tuning.parameter_mask import ParameterMask, Trainable, every

GROUPS = {
    "all": "every parameter",
    "norms": "gains and biases of norms, and alphas of curves",
    "heads": "the weights and biases of attention heads",
    "mlps": "MLPs",
    "biases": "every bias, those of norms among them",
    "scalers": "factors on heads and on the residual stream",
}
"""Words for many components at once."""


def select_parameters(model: HookedTransformer, *words: str, seed: int = 0) -> ParameterMask:
    """The parameters of a model that words name, as `Recipe.trainable` understands them.

    Args:
        model: With live norms, or with norm sites; tied weights are one parameter, named `embed`.
        words: `all`, `norms`, `heads`, `mlps`, `biases` or `scalers`; one of them for some
            components, by kind, layer or name: `norms:ln2`, `norms:L3`, `heads:L3H1`,
            `biases:mlp`; a component of `lf.list_weight_components`, such as `embed` and
            `blocks.0.mlp`; or a share of any of them that is drawn by chance, `20% of norms`.
            Several words choose what any of them does.
        seed: The seed of what is drawn.

    Returns:
        The mask, by the parameters' names in a stock model. Parameters that the architecture in
        transformers does not have, such as a Llama's biases, are never among them.

    Raises:
        RecipeError: if a word names nothing that the model has.
        UnsupportedModelError: for a folded model, whose parameters are not those of a run.

    Source:
        The groups are those of arXiv 2403.20284 (norms), 2106.10199 (biases).

    Examples:
        >>> lf.select_parameters(model, "norms:ln2", "L0H1")
        26,208 entries of 15 parameters
        >>> lf.select_parameters(model, "20% of norms").count
        691
    """
    # The names of a stock model, and tied weights once.
    sited = model if has_norm_sites(model) else with_norm_sites(model, copy_weights=False)
    places = parameters_of(sited)
    mask = ParameterMask({})
    for word in words:
        match = re.fullmatch(r"([\d.]+)% of (.+)", word)
        found = _named(model, places, match[2] if match else word)
        mask |= _drawn(found, _percent(match[1]), seed) if match else found
    return mask


def random_subset(mask: ParameterMask, share: float, *, seed: int = 0) -> ParameterMask:
    """Some of what a mask chooses, drawn by chance: what an informed choice is compared with.

    Args:
        mask: What is drawn from.
        share: The share of its entries that is drawn, in 0..1.
        seed: The seed of the draw.

    Returns:
        The drawn entries, all parameters alike.

    Raises:
        RecipeError: if the share is not in 0..1.

    Examples:
        >>> norms = lf.select_parameters(model, "norms")
        >>> lf.random_subset(norms, 0.5).count / norms.count
        0.5
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"share must lie in 0..1, not {share}")
    return _drawn(mask, share, seed)


def chosen_by(model: HookedTransformer, trainable: Trainable, seed: int) -> ParameterMask:
    """The mask of what a recipe's `trainable` means in a model with norm sites.

    Raises:
        RecipeError: if it does not fit the model.
    """
    if isinstance(trainable, str | tuple):
        words = (trainable,) if isinstance(trainable, str) else trainable
        return select_parameters(model, *words, seed=seed)
    places = parameters_of(model)
    for name, mask in trainable.chosen.items():
        if name not in places:
            raise RecipeError(f"trainable chooses {name}, which the model does not have or train")
        if mask.shape != places[name].shape:
            raise RecipeError(
                f"trainable: the mask of {name} is {list(mask.shape)}, the parameter is "
                f"{list(places[name].shape)}"
            )
    return trainable


def parameters_of(model: HookedTransformer) -> dict[str, nn.Parameter]:
    """What a run may train of a model with norm sites, by its name in a stock model: all but what
    its class in transformers does not have, and a tied weight once."""
    foreign = foreign_parameters(model)
    return {stock_name(name): W for name, W in model.named_parameters() if name not in foreign}


def foreign_parameters(model: HookedTransformer) -> set[str]:
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


def _named(model: HookedTransformer, places: dict[str, nn.Parameter], word: str) -> ParameterMask:
    """The parameters that one word names."""
    components = list_weight_components(model)
    group, colon, which = word.partition(":")
    if colon and group not in GROUPS:
        raise RecipeError(f"there is no group {group!r}: the groups are {', '.join(GROUPS)}")
    if word not in GROUPS and not colon and word not in {c.name for c in components}:
        names = [*GROUPS, *(c.name for c in components)]
        near = difflib.get_close_matches(word, names, n=1, cutoff=0)
        raise RecipeError(
            f"there is no component {word!r}; the nearest is {near[0]}. Give a group "
            f"({', '.join(GROUPS)}), or a component of lf.list_weight_components"
        )
    belongs = _groups(model).get(group, lambda component, _: component.name == group)
    chosen: dict[str, Tensor] = {}
    tied = False
    for component in components:
        if which and which not in (component.name, component.kind, f"L{component.layer}"):
            continue
        for name, row in component.parts:
            if not belongs(component, name.rpartition(".")[2].lstrip("_")):
                continue
            tied |= name == "unembed.W_U" and name not in places
            if name in places:
                shape = places[name].shape
                if row is None:
                    chosen[name] = every(shape)
                else:
                    chosen.setdefault(name, torch.zeros(shape, dtype=torch.bool))[row] = True
    if not chosen and tied:
        raise RecipeError(f"{word}: the unembedding is tied to the embedding; name it: embed")
    if not chosen:
        raise RecipeError(
            f"the model has no parameters for {word!r}: "
            + (GROUPS[group] if group in GROUPS and not which else "see lf.list_weight_components")
        )
    return ParameterMask(chosen)


def _groups(model: HookedTransformer) -> dict[str, Callable[[WeightComponent, str], bool]]:
    """Whether a parameter of a component, by its own name such as `b_Q`, belongs to a group."""
    sites = [str(site) for site in list_norm_sites(model)]
    norms, scalers = {*sites, *map(whole_norm, sites)}, list_scalers(model)
    return {
        "all": lambda component, _: True,
        "norms": lambda component, _: component.name in norms,
        "heads": lambda component, _: component.kind in ("head", "kv_head"),
        "mlps": lambda component, _: component.kind == "mlp",
        "biases": lambda _, leaf: leaf.startswith("b"),
        "scalers": lambda component, _: component.name in scalers,
    }


def _percent(text: str) -> float:
    try:
        share = float(text) / 100
    except ValueError as error:
        raise RecipeError(f"{text}% is not a share") from error
    if not 0 < share <= 1:
        raise RecipeError(f"{text}% must lie in 0..100 (0 excluded)")
    return share


def _drawn(mask: ParameterMask, share: float, seed: int) -> ParameterMask:
    chance = torch.rand(mask.count, generator=torch.Generator().manual_seed(seed))
    return mask.keep(chance.topk(round(share * mask.count)).indices)
