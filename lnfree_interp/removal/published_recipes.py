"""The published recipes of GPT-2: functions that return a `Recipe`.

They come from two repositories. What they share: AdamW, gradients clipped at 1, sequences of 1024
tokens of OpenWebText packed with end-of-text, the order `ln2`, `ln1` for queries and keys, `ln1`
for values, `ln_final`. Not repeated here: dropout, bfloat16 master weights, masked end-of-text
targets, a special sigma on channel 0 (docs/removal-reference.md).
"""

from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import published_order, sequential_sites
from lnfree_interp.removal.settings import Special, Statistics

CONFIG = "submarat/removing-layer-norm, config.py"
"""Where most of their numbers come from."""
_TRAIN = "submarat/removing-layer-norm, train.py"
_SOURCES = {
    "events, steps, batch, lr, final_lr, warmup, scale_anchor": f"{CONFIG}; 2507.02559",
    "decay_steps": f"{CONFIG}: max_steps, published as a checkpoint before the end",
    "statistics": f"{_TRAIN} with EXP_RECOMPUTE_STD_ON_REAL=1, as its runners set it; there once "
    "per micro-batch, hence momentum to their number; one buffer for ln1.qk and ln1.v",
    "clip, weight_decay": f"{_TRAIN}: 1.0 and 0.01",
    "betas": "transformers.TrainingArguments' defaults",
    "batch": f"{CONFIG}: sequences per micro-batch times accumulation steps",
}


def _published(
    n_layers: int,
    *,
    name: str,
    steps: int,
    micro_batch: int,
    accumulation: int,
    lr: float,
    min_lr: float,
    warmup: int,
    anchor: float,
    momentum: float,
    start: int,
    gaps: tuple[int, int, int],
    decay_steps: int | None = None,
) -> Recipe:
    ln2_gap, qk_gap, v_gap = gaps
    return Recipe(
        name=name,
        events=published_order(
            sequential_sites(n_layers), start=start, ln2_gap=ln2_gap, qk_gap=qk_gap, v_gap=v_gap
        ),
        steps=steps,
        decay_steps=decay_steps,
        batch=micro_batch * accumulation,
        micro_batch=micro_batch,
        lr=lr,
        final_lr=min_lr / lr,
        warmup=warmup,
        betas=(0.9, 0.999),
        scale_anchor=anchor,
        statistics=Statistics(source="ema", momentum=momentum**accumulation, share_ln1=True),
        sequence_length=1024,
        sources=_SOURCES,
    )


def gpt2_small(*, anchor: bool = True) -> Recipe:
    """2507.02559's recipe for GPT-2 small: 300 steps, 157M tokens, schaeff/gpt2-small_LNFree300.

    Args:
        anchor: With the auxiliary loss, as published; or their variant without it.

    Returns:
        A `Recipe` for the 37 norm sites of a model with 12 blocks.

    Source:
        arXiv 2507.02559; settings of https://github.com/submarat/removing-layer-norm, config.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_small()
        >>> len(recipe.events), recipe.steps
        (37, 300)
    """
    return _published(
        12,
        name="gpt2_aux" if anchor else "gpt2",
        steps=300,
        micro_batch=32 if anchor else 40,
        accumulation=16 if anchor else 12,
        lr=6e-4,
        min_lr=3e-4,
        warmup=25 if anchor else 20,
        anchor=0.1 if anchor else 0.0,
        momentum=0.9,
        start=20,
        gaps=(2, 2, 3),
    )


def gpt2_medium(*, anchor: bool = True) -> Recipe:
    """2507.02559's recipe for GPT-2 medium: 500 steps, 259M tokens.

    Args:
        anchor: With the auxiliary loss, as published; or their variant without it.

    Returns:
        A `Recipe` for the 73 norm sites of a model with 24 blocks.

    Source:
        arXiv 2507.02559; settings of https://github.com/submarat/removing-layer-norm, config.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_medium()
        >>> len(recipe.events), recipe.steps
        (73, 500)
    """
    return _published(
        24,
        name="medium_fasttune_aux" if anchor else "medium_fasttune",
        steps=500,
        micro_batch=22,
        accumulation=23,
        lr=6e-4,
        min_lr=3e-4,
        warmup=10,
        anchor=0.1 if anchor else 0.0,
        momentum=0.9,
        start=20,
        gaps=(2, 2, 3),
    )


def gpt2_large(*, anchor: bool = True) -> Recipe:
    """2507.02559's recipe for GPT-2 large: published at step 600 of 1200, 310M tokens.

    Args:
        anchor: With the auxiliary loss, as published; or their variant without it, 1200 steps.

    Returns:
        A `Recipe` for the 109 norm sites of a model with 36 blocks.

    Source:
        arXiv 2507.02559; settings of https://github.com/submarat/removing-layer-norm, config.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_large()
        >>> len(recipe.events), recipe.steps
        (109, 600)
    """
    return _published(
        36,
        name="large_aux" if anchor else "large",
        steps=600 if anchor else 1200,
        decay_steps=1200,
        micro_batch=28,
        accumulation=18,
        lr=3e-4,
        min_lr=4e-5,
        warmup=15,
        anchor=0.03 if anchor else 0.0,
        momentum=0.912,
        start=30,
        gaps=(4, 4, 6),
    )


def gpt2_xl(*, anchor: bool = True) -> Recipe:
    """2507.02559's recipe for GPT-2 XL: published at step 800 of 1200, 413M tokens.

    Args:
        anchor: With the auxiliary loss, as published; or their variant without it, 1200 steps.

    Returns:
        A `Recipe` for the 145 norm sites of a model with 48 blocks.

    Source:
        arXiv 2507.02559; settings of https://github.com/submarat/removing-layer-norm, config.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_xl()
        >>> len(recipe.events), recipe.steps
        (145, 800)
    """
    return _published(
        48,
        name="xl_aux" if anchor else "xl",
        steps=800 if anchor else 1200,
        decay_steps=1200,
        micro_batch=18,
        accumulation=28,
        lr=1e-4,
        min_lr=2e-5,
        warmup=20,
        anchor=0.01 if anchor else 0.0,
        momentum=0.942,
        start=50 if anchor else 20,
        gaps=(4, 4, 6) if anchor else (2, 2, 3),
    )


def gpt2_small_2024() -> Recipe:
    """2409.13710's recipe for GPT-2 small: 1200 steps, 590M tokens, apollo-research/gpt2_noLN.

    Position 0 has its own sigma until step 1160, end-of-text (on the value path) until 1060. Their
    code put the special sigma on channel 0 instead of position 0; this is what was meant.

    Returns:
        A `Recipe` for the 37 norm sites of a model with 12 blocks.

    Source:
        arXiv 2409.13710; settings of https://github.com/ApolloResearch/gpt2_noLN, train.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_small_2024()
        >>> recipe.special.first_until, recipe.removed_at
        (1160, 1160)
    """
    code = "ApolloResearch/gpt2_noLN"
    return Recipe(
        name="gpt2_noLN hf_1200",
        events=published_order(
            sequential_sites(12), start=200, ln2_gap=20, qk_gap=20, v_gap=30
        ),
        steps=1200,
        decay_steps=2000,
        batch=480,
        micro_batch=48,
        lr=6e-4,
        final_lr=0.1,
        warmup=100,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        scale_anchor=0.0,
        statistics=Statistics(source="start", tokens="ordinary"),
        special=Special(
            first_until=1160, end_of_text_until=1060, end_of_text_kinds=("ln1.v",)
        ),
        sequence_length=1024,
        sources={
            "events, special": f"{code}, train.py; 2409.13710",
            "steps, decay_steps": f"{code}: stopped at 1200 of a decay over 2000",
            "batch, lr, final_lr, warmup, weight_decay, betas, clip": f"{code}, nanoGPT settings",
            "statistics": f"{code}, std_dicts.py: constants of the original model, written down; "
            "measured here before the first step",
        },
    )  # fmt: skip
