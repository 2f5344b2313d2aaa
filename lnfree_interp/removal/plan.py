"""A recipe in words."""

from collections.abc import Iterable, Iterator, Sequence

from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import Event, Weight

_AVERAGES = {
    "mean": "mean of the tokens' standard deviations",
    "rms": "root mean square of the tokens' standard deviations",
    "least_squares": "constant nearest to the live norm in least squares",
}


def plan(recipe: Recipe, sequence_length: int | None = None, *, text: str | None = None) -> str:
    """What a recipe will do, line by line.

    Args:
        recipe: The recipe.
        sequence_length: Tokens per sequence of text. Default: what the recipe was made for.
        text: What it is trained on, if that is known.

    Returns:
        The lines, joined.
    """
    rows = [] if text is None else [("text", text)]
    rows += _rows(recipe, sequence_length or recipe.sequence_length)
    return "\n".join([f"recipe: {recipe.name}", *aligned(rows)])


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of two columns, indented."""
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}".rstrip() for name, text in rows]


def _rows(recipe: Recipe, length: int | None) -> Iterator[tuple[str, str]]:
    size = f"{recipe.steps} of {recipe.batch} sequences"
    if length is not None:
        tokens = recipe.batch * length
        size += f" x {length} tokens: {tokens:,} a step, {recipe.steps * tokens:,} in all"
    yield "steps", size
    decay = recipe.decay_steps or recipe.steps
    yield (
        "learning rate",
        f"AdamW, {recipe.lr:g} after {recipe.warmup} steps, cosine to "
        f"{recipe.lr * recipe.final_lr:g} at step {decay}; betas {recipe.betas[0]:g}, "
        f"{recipe.betas[1]:g}; decay {recipe.weight_decay:g}; clipped at {recipe.clip:g}",
    )
    if (trainable := recipe.trainable) != "all":
        words = trainable if isinstance(trainable, tuple) else (str(trainable),)
        yield "trained", f"{', '.join(words)}; all other parameters stay what they are"
    for release in recipe.release:
        yield "released", str(release)
    yield "loss", _loss(recipe)
    if recipe.repeats:
        yield (
            "repeats",
            f"{recipe.repeats:.0%} of the sequences have a stretch of one token, or two in turn",
        )
    if recipe.random_tokens:
        yield (
            "random tokens",
            f"{recipe.random_tokens:.0%} of the sequences have a stretch of the whole vocabulary's",
        )
    if recipe.embedding_cap:
        yield (
            "embeddings",
            f"rows longer than {recipe.embedding_cap:g} times the text's mean are shortened to it",
        )
    if recipe.weight_average:
        yield (
            "weights",
            f"in the end their moving average over about {1 / (1 - recipe.weight_average):.0f} "
            "steps" + (", since all sites are frozen" if recipe.events else ""),
        )
    yield "precision", f"{recipe.precision}, over float32 weights"
    if recipe.patience is not None:
        yield (
            "early stop",
            f"after {recipe.patience} evaluations (every {recipe.evaluate_every} steps) "
            "without a lower loss",
        )
    if not recipe.events:
        yield "norms", "stay live: this is a control"
        return
    yield "sigma", _sigma(recipe)
    guard = recipe.guard
    action = (
        "then stop"
        if guard.action == "stop"
        else f"then back to a checkpoint, gaps {guard.widen:g} times as wide, learning rate "
        f"{guard.slower:g} times as high"
    )
    if guard.spike is not None:
        yield "skipped", f"a gradient of {guard.spike:g} times the usual norm: the weights stay"
    after = f", in {guard.in_a_row} steps in a row" if guard.in_a_row > 1 else ""
    watched = "KL divergence" if recipe.always_distils else "cross-entropy"
    yield (
        "diverging",
        f"{watched} {guard.above_best:g} above the lowest, or a site's inputs "
        f"{guard.sigma_factor:g} times its sigma{after}; {action}",
    )
    yield "norms", f"{len(recipe.events)} sites; all gone at step {recipe.removed_at}"
    if recipe.wait is not None:
        yield (
            "waiting",
            f"up to {recipe.wait.steps} steps, one after each step whose KL divergence is above "
            f"{recipe.wait.above:g} nats",
        )
    for phase in _phases(recipe.events):
        yield _phase(phase)
    yield from _special(recipe)
    for what, source in recipe.sources.items():
        yield "source", f"{what}: {source}"


def _loss(recipe: Recipe) -> str:
    parts = ["cross-entropy of the next token, end-of-text included"]
    if recipe.distillation:
        share = _shown(recipe.distillation)
        parts = [f"{share} x KL divergence from the original, cross-entropy with the rest"]
    if recipe.scale_anchor:
        target = {"batch": "the batch's mean", "frozen": "their mean before the first step"}
        parts.append(
            f"{_shown(recipe.scale_anchor)} x squared distance of ln_final's input sigmas from "
            + target[recipe.anchor_target]
        )
    parts += [f"{_shown(weight)} x {name}" for name, weight in recipe.losses.items()]
    return " + ".join(parts)


def _shown(weight: Weight) -> str:
    return f"{weight:g}" if isinstance(weight, float | int) else f"({weight})"


def _sigma(recipe: Recipe) -> str:
    statistics = recipe.statistics
    where = {
        "start": f"{statistics.sequences} sequences before the first step",
        "event": f"{statistics.sequences} sequences at the site's event",
        "ema": f"a moving average over the training text (momentum {statistics.momentum:.3g})",
        "batch": "the latest step's text",
    }[statistics.source]
    text = f"{_AVERAGES[statistics.average]}, over {where}"
    if statistics.tokens == "ordinary":
        text += ", position 0, end-of-text and outliers apart"
    text += "; one for ln1.qk and ln1.v" if statistics.share_ln1 else ""
    return text + ("; follows until all are frozen" if statistics.follow_frozen else "")


def _special(recipe: Recipe) -> Iterator[tuple[str, str]]:
    special = recipe.special
    if special.first_until:
        yield "position 0", f"has a sigma of its own until step {special.first_until}"
    if special.keep_first:
        yield "position 0", "keeps a sigma of its own, in the finished model too"
    if special.outliers_until:
        first, last = special.outlier_caps
        end = "stays from" if special.outliers_stay else "is gone at"
        yield (
            "outliers",
            f"no token comes out more than {first:g} times as large as from a live norm; this cap "
            f"rises from step {special.outliers_from} and {end} step {special.outliers_until}, at "
            f"{last:g}",
        )
    if special.end_of_text_until:
        kinds = special.end_of_text_kinds
        where = "" if kinds is None else f" at {', '.join(kinds)}"
        yield (
            "end-of-text",
            f"has a sigma of its own{where} until step {special.end_of_text_until}",
        )


def _phases(events: Iterable[Event]) -> list[list[Event]]:
    """Groups of events of one kind, layer by layer at equal distances."""
    phases: list[list[Event]] = []
    for event in sorted(events, key=lambda e: (e.step, e.site.kind, e.site.layer or 0)):
        for phase in phases:
            last = phase[-1]
            gap = phase[1].step - phase[0].step if len(phase) > 1 else event.step - last.step
            regular = event.step - last.step == gap and event.over == last.over
            next_layer = (event.site.layer or 0) == (last.site.layer or 0) + 1
            if event.site.kind == last.site.kind and regular and next_layer:
                phase.append(event)
                break
        else:
            phases.append([event])
    return phases


def _phase(phase: list[Event]) -> tuple[str, str]:
    first, last = phase[0], phase[-1]
    kind = first.site.kind
    if len(phase) == 1:
        kind = kind if first.site.layer is None else f"{first.site}"
        when = f"step {first.step}"
    else:
        gap = phase[1].step - first.step
        layers = f"blocks {first.site.layer} to {last.site.layer}"
        when = f"{layers}: step {first.step}" + (f" to {last.step}, every {gap}" if gap else "")
    over = f", each fading over {first.over} steps" if first.over else ""
    return f"  {kind}", when + over
