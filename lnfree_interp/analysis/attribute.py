"""Attribution: a target as a sum over the parts of a level, on one trace.

On an LN-free model a target is linear in the residual stream, so the parts add up to it, and taking
one away changes it by exactly that part. Where something that is not affine is held, the parts
still add up, but they no longer say what taking one away does; `gaps` measures what that misses.
"""

from typing import Any, Literal, SupportsIndex

from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.gaps import target_gap
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.logit_targets import Logit, LogitDifference, NextTokens
from lnfree_interp.analysis.parts import project
from lnfree_interp.analysis.positions import whole_number
from lnfree_interp.analysis.prompts import Answers
from lnfree_interp.analysis.results import Contributions
from lnfree_interp.analysis.score_targets import Score
from lnfree_interp.analysis.scores import attribute_scores
from lnfree_interp.analysis.targets import Neuron, Target
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.errors import DataError


@analysis
def attribute(
    trace: Trace, target: Target, by: str | Level = "head", *, biases: bool = False
) -> Any:
    """A target as a labelled sum over the parts of the model.

    Args:
        trace: A trace; or a model and a prompt, as two arguments.
        target: What to explain: `lf.Logit`, `lf.LogitDifference`, `lf.NextTokens`, `lf.Score`,
            `lf.LogOdds`, `lf.Neuron`, `lf.Probe`, or an object with the members of `lf.Target`.
        by: How finely the model is taken apart: the name of a level, or an object with the members
            of `lf.Level`.
        biases: Whether each head's value bias is a part of its own, by head and by neuron; if not,
            it is in the head's part.

    Returns:
        `Contributions` with values [component, *dims], in the target's unit; for a `Score` without
        a side, a `ScoreAttribution`.

    Raises:
        InexactError: if a norm that the target reads through is live, or a soft cap lies behind
            it, and the trace does not hold.
        DataError: for a target, level or position that does not exist.
        UnsupportedModelError: if queries and keys of a `TransformerBridge` pass norms of their own,
            for scores.

    Source:
        Elhage et al. 2021, https://transformer-circuits.pub/2021/framework; exact on LN-free
        models: arXiv 2409.13710, arXiv 2507.02559. One call for every target is ours.

    Examples:
        >>> trace = lf.trace(free, "for i in")
        >>> lf.attribute(trace, lf.LogitDifference(" range", " self"), by="sublayer").verify()
        Contributions(sublayer level, values [11], error ...)
        >>> lf.attribute(trace, lf.Neuron(1, 7), by="head").verify().labels[-1]
        '1_b_in'
    """
    if not isinstance(target, Target):
        raise DataError(
            f"{target!r:.60} is no target: give lf.Logit(...) or another target, or an object with "
            "the methods `needs` and `read`"
        )
    if isinstance(target, Score) and target.side is None:
        if len(set(trace.lengths)) > 1 and whole_number(target.key, "a key") < 0:
            raise DataError(
                f"key {target.key} is another position in each of these prompts, which are not "
                "equally long: count keys from 0, give a side, or take one with trace.select(i)"
            )
        return attribute_scores(trace, target.layer, target.head, target.query, [target.key], by=by)
    chosen = level(by)
    place, names = target.needs(trace)
    trace.need(*names, *chosen.needs(trace.view, place), *([place.hook] if trace.hold else []))
    reading = target.read(trace)
    parts = list(chosen.parts(trace, reading.place, reading.at, biases))
    values, components = project(parts, reading.direction, reading.constants)
    if reading.summed:
        values = values.sum(-1, keepdim=True)
    gap = None
    if reading.held:
        stream = reading.at.of(trace.stream(reading.place))
        gap = target_gap(reading, parts, stream, values, components)
    total = reading.total
    if len(reading.dims) == 1:
        values, total = values[..., 0], total[:, 0]
    result = Contributions(
        values, components, total, chosen.name, reading.dims, reading.of,
        trace.prompts if reading.with_prompts else (), reading.answers, reading.unit,
        reading.identity, reading.held, gap, scale=reading.scale,
    )  # fmt: skip
    return result.select(prompt=0) if trace.single else result


@analysis
def attribute_logits(
    trace: Trace,
    answer: Answers,
    foil: Answers | None = None,
    *,
    by: str | Level = "head",
    biases: bool = False,
) -> Contributions:
    """What each part of the model adds to the next token's logit, or logit difference.

    Args:
        trace: A trace; or a model and a prompt, as two arguments.
        answer: The next token: a string that is one token (mind the leading space), or its id; one
            for all prompts, one each, or several each. For one prompt, a sequence is several
            answers.
        foil: The token whose logit is subtracted, given as `answer` is.
        by: How finely the model is taken apart: `"layer"`; `"sublayer"`, attention and MLP of each
            layer; `"head"`, attention by head, its output bias b_O apart; `"source"`, each head by
            the token that it reads, its value bias b_V apart; `"neuron"`, heads, and MLPs by
            neuron, their bias b_out apart. Or an object with the members of `lf.Level`.
        biases: Whether each head's value bias is a part of its own, by head and by neuron; if not,
            it is in the head's part.

    Returns:
        Values [component] for one prompt, [component, prompt] for several, with a last dimension
        [answer] where there are several answers; in logits. By source, a prompt that is shorter
        than the longest has zeros where it has no token.

    Raises:
        InexactError: if the final norm is live or the logits are capped, and the trace does not
            hold.
        DataError: if an answer is not one token, or is its own foil, the numbers of prompts and
            answers differ, or there is no such level; and as for `trace`.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Elhage et al. 2021, https://transformer-circuits.pub/2021/framework; exact on LN-free
        models: arXiv 2409.13710, arXiv 2507.02559. The gap is ours.

    Examples:
        >>> dla = lf.attribute_logits(free, "for i in", " range", by="head").verify()
        >>> dla.values.shape, dla.labels[:3]
        (torch.Size([35]), ['embed', 'pos_embed', 'L0H0'])
        >>> lf.attribute_logits(free, ["for i in", "for"], " range", " len").values.shape
        torch.Size([35, 2])
    """
    target = Logit(answer) if foil is None else LogitDifference(answer, foil)
    return attribute(trace, target, by, biases=biases)


@analysis
def attribute_next_tokens(
    trace: Trace, *, by: str | Level = "head", biases: bool = False
) -> Contributions:
    """What each part adds to the logit of the true next token, at every position.

    Args:
        trace: A trace; or a model and tokens [sequence, pos], as two arguments.
        by: How finely the model is taken apart, as in `attribute_logits`.
        biases: Whether each head's value bias is a part of its own, by head and by neuron.

    Returns:
        Values [component, sequence, pos - 1], in logits.

    Raises:
        InexactError: if the final norm is live or the logits are capped, and the trace does not
            hold.
        DataError: if the rows have no next token, differ in length, or the model cannot read them;
            or if there is no such level.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        The same as `attribute_logits`: Elhage et al. 2021,
        https://transformer-circuits.pub/2021/framework; arXiv 2409.13710.

    Examples:
        >>> dla = lf.attribute_next_tokens(free, tokens, by="sublayer").verify()
        >>> dla.values.shape
        torch.Size([11, 4, 63])
        >>> dla["3_mlp_out"].mean(0).shape
        torch.Size([63])
    """
    return attribute(trace, NextTokens(), by, biases=biases)


@analysis
def attribute_neuron(
    trace: Trace,
    layer: SupportsIndex,
    neuron: SupportsIndex,
    pos: SupportsIndex = -1,
    *,
    of: Literal["pre", "post"] = "pre",
    by: str | Level = "head",
    biases: bool = False,
) -> Contributions:
    """A neuron's input, or its activation, as a sum over the parts of the stream.

    The neuron's bias b_in is a component too, and so is the bias of its norm, `1_ln2.b`, if any.

    Args:
        trace: A trace; or a model and a prompt, as two arguments.
        layer: The neuron's layer, counted from 0.
        neuron: The neuron's index in its layer, counted from 0.
        pos: Position at which the neuron is read, from each prompt's own end if negative.
        of: `"pre"`: the input of the activation function. `"post"`: the activation, split
            completely by the secant post / pre; in a gated MLP, the activation with its gate given.
        by: How finely the model is taken apart, as in `attribute_logits`.
        biases: Whether each head's value bias is a part of its own, by head and by neuron.

    Returns:
        Values [component], or [component, prompt] for several, in units of the neuron's input or
        of its activation.

    Raises:
        DataError: if there is no such neuron, position, level or `of`.
        InexactError: if the norm before the MLP is live and the trace does not hold.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Neurons as keys that the stream is compared with: arXiv 2012.14913. The sum over the parts
        of the stream, and the secant, are ours.

    Examples:
        >>> neuron = lf.attribute_neuron(free, "for i in", layer=1, neuron=7).verify()
        >>> neuron.values.shape, neuron.labels[-1]
        (torch.Size([18]), '1_b_in')
        >>> _ = lf.attribute_neuron(free, "for i in", layer=1, neuron=7, of="post").verify()
    """
    return attribute(trace, Neuron(layer, neuron, pos, of), by, biases=biases)
