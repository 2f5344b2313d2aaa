"""Interventions by label, against hooks of TransformerLens that are written out here."""

from functools import cache

import pytest
import torch
from support.loaded import live_model
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.errors import DataError, InexactError

PROMPTS = torch.tensor([[11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26]])
OTHER = PROMPTS.flip(1) + 40
ANSWER, FOIL = 3, 5
TARGET = lf.LogitDifference(ANSWER, FOIL)
KINDS = ["gpt2", "neox", "qwen2", "llama-grouped"]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@cache
def made(kind, form):
    live = live_model(kind)
    if form == "live":
        return live
    sites = freeze_all(live)
    folded = lf.fold(sites)
    return {"sites": sites, "folded": folded, "frozen": lf.frozen_form(folded)}[form]


MODELS = [("gpt2", "live"), ("gpt2", "sites"), ("gpt2", "folded"), ("neox", "live"),
          ("neox", "folded"), ("qwen2", "folded"), ("llama-grouped", "live")]  # fmt: skip


@pytest.fixture(params=MODELS, ids="-".join)
def model(request):
    return made(*request.param)


def trace_of(model, tokens=PROMPTS):
    return lf.trace(model, tokens, hold=True)


def wanted(model, hooks=(), tokens=PROMPTS):
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))[:, -1]
    return logits[:, ANSWER] - logits[:, FOIL]


def kept(model, tokens=PROMPTS):
    return model.run_with_cache(tokens)[1]


def value_bias(model, layer, head):
    """A head's value of a stream that is zero."""
    name, nothing = f"blocks.{layer}.attn.hook_v", torch.zeros(1, 1, 32, dtype=torch.float64)
    v = model.run_with_cache(nothing, start_at_layer=layer, stop_at_layer=layer + 1)[1][name][0, 0]
    return v[head * len(v) // model.cfg.n_heads]


def from_token(model, acts, layer, head, pos):
    """What a head gets from one token, biases apart."""
    v, pattern = acts["v", layer], acts["pattern", layer][:, head]
    value = v[:, pos, head * v.shape[2] // model.cfg.n_heads] - value_bias(model, layer, head)
    return pattern[:, :, pos, None] * value[:, None]


def put(where, new):
    """A hook that puts something at an index."""

    def hook(x, hook):
        x = x.clone()
        x[where] = new
        return x

    return hook


HEAD = (slice(None), slice(None), 2)
NEURON = (slice(None), slice(None), 9)
PLACES = {  # label: the hook, and what of it
    "L1H2": ("blocks.1.attn.hook_z", HEAD),
    "L2H2": ("blocks.2.attn.hook_z", HEAD),
    "L1N9": ("blocks.1.mlp.hook_post", NEURON),
    "2_mlp_out": ("blocks.2.hook_mlp_out", ...),
    "0_mlp_out": ("blocks.0.hook_mlp_out", ...),
    "0_attn_out": ("blocks.0.hook_attn_out", ...),
    "embed": ("hook_embed", ...),
    "pos_embed": ("hook_pos_embed", ...),
    "embed@2": ("hook_embed", (slice(None), 2)),
}


def replaced(acts, other, hook, where, with_):
    """What takes an activation's place."""
    x = acts[hook][where]
    if with_ == "zero":
        return torch.zeros_like(x)
    if with_ == "trace":
        return other[hook][where]
    return acts[hook].mean((0, 1))[where[2:] if where is not ... and len(where) > 2 else ...]


def by_hand(model, label, with_):
    """A component's replacement as a hook."""
    hook, where = PLACES[label]
    return hook, put(where, replaced(kept(model), kept(model, OTHER), hook, where, with_))


WITH = ("zero", "mean", "trace")


@pytest.mark.parametrize("label", PLACES)
@pytest.mark.parametrize("with_", WITH)
def test_an_intervention_is_what_hooks_do(model, label, with_):
    if label == "pos_embed" and model.cfg.positional_embedding_type == "rotary":
        with pytest.raises(DataError, match="no pos_embed"):
            lf.ablate(trace_of(model), label)
        return
    replacement = trace_of(model, OTHER) if with_ == "trace" else with_
    change = lf.ablate(trace_of(model), label, replacement)
    effects, hook = change.compare(TARGET), by_hand(model, label, with_)
    before = wanted(model)
    close(effects.before, before)
    close(effects.total_effect[0], before - wanted(model, [hook]))
    assert effects.total_effect.abs().max() > 1e-9 or (label, with_) == ("pos_embed", "trace")
    # The hooks and the stream that it gives are those of the same run.
    stream = {}
    tap = ("blocks.2.hook_resid_post", lambda x, hook: stream.update(x=x))
    logits = model.run_with_hooks(PROMPTS, fwd_hooks=[hook, tap])
    close(change.run(), stream["x"])
    close(model.run_with_hooks(PROMPTS, fwd_hooks=change.hooks()), logits)
    if effects.certificate.holds:
        close(effects.predicted, effects.direct)


@pytest.mark.parametrize("label", ["L1H2", "L1N9", "2_mlp_out", "0_attn_out", "embed@2"])
@pytest.mark.parametrize("with_", WITH)
def test_predicted_is_attribution_and_direct_is_the_stream_without(model, label, with_):
    replacement = trace_of(model, OTHER) if with_ == "trace" else with_
    effects = lf.ablate(trace_of(model), label, replacement).compare(TARGET)
    acts, other = kept(model), kept(model, OTHER)
    hook, where = PLACES[label]
    x = acts[hook][where] - replaced(acts, other, hook, where, with_)
    if label.startswith("L1H"):
        x = x @ model.W_O[1, 2]
    elif label.startswith("L1N"):
        x = x[..., None] * model.W_out[1][9]
    gone = x[:, -1] if label != "embed@2" else torch.zeros(2, 32, dtype=torch.float64)
    stream = acts["blocks.2.hook_resid_post"][:, -1]

    def logits(stream):
        norm = model.ln_final if model.cfg.normalization_type is not None else lambda x: x
        found = model.unembed(norm(stream[:, None]))[:, 0]
        return found[:, ANSWER] - found[:, FOIL]

    close(effects.direct[0], logits(stream) - logits(stream - gone))
    if effects.held:
        assert effects.held == ("ln_final",)
        if label != "embed@2":
            assert effects.gap.relative > 1e-4
            with pytest.raises(InexactError):
                effects.verify()
    else:
        effects.verify(1e-10)
        close(effects.predicted, effects.direct)


def test_zero_is_what_attribution_says(model):
    labels = ["L0H1", "L2H3", "1_mlp_out", "embed"]
    share = lf.attribute_logits(trace_of(model), ANSWER, FOIL)
    effects = lf.ablate(trace_of(model), labels).compare(TARGET)
    for row, label in enumerate(labels):
        close(effects.predicted[row], share[label])
    close(effects.predicted[-1], sum(share[label] for label in labels))


@pytest.mark.parametrize("with_", WITH)
@pytest.mark.parametrize("layer", [0, 2])
def test_what_a_head_reads_of_one_token(model, layer, with_):
    head, pos = 2, 3
    replacement = trace_of(model, OTHER) if with_ == "trace" else with_
    change = lf.ablate(trace_of(model), f"L{layer}H{head}@{pos}", replacement)
    effects = change.compare(TARGET)
    acts = kept(model)
    moved = from_token(model, acts, layer, head, pos)
    if with_ == "mean":
        moved = moved - moved.mean((0, 1))
    elif with_ == "trace":
        moved = moved - from_token(model, kept(model, OTHER), layer, head, pos)
    name = f"blocks.{layer}.attn.hook_z"
    hook = (name, put(HEAD, acts[name][HEAD] - moved))
    close(effects.total_effect[0], wanted(model) - wanted(model, [hook]))
    assert effects.total_effect.abs().max() > 1e-6
    found = model.run_with_hooks(PROMPTS, fwd_hooks=change.hooks())
    close(found, model.run_with_hooks(PROMPTS, fwd_hooks=[hook]))
    if with_ == "zero":
        share = lf.attribute_logits(trace_of(model), ANSWER, FOIL, by="source")
        close(effects.predicted[0], share[f"L{layer}H{head}@{pos}"])
    if not effects.held:
        effects.verify(1e-10)


def reads_without(model, acts, layer, head, gone):
    """What a head puts out if something is missing from what it reads, and nothing else is."""
    hook = f"blocks.{layer}.attn.hook_z"
    stream = acts[f"blocks.{layer}.hook_resid_pre"] - gone
    found = model.run_with_cache(stream, start_at_layer=layer, stop_at_layer=layer + 1)[1]
    return found[hook][:, :, head]


def path_by_hand(model, label, with_):
    """Path patching, written out: each head on the way reads the change, and nobody else."""
    acts, other = kept(model), kept(model, OTHER)
    start, *heads = label.split(" > ")
    hook, where = PLACES[start]
    gone = acts[hook][where] - replaced(acts, other, hook, where, with_)
    if start == "embed@2":
        gone = torch.zeros_like(acts["hook_embed"]).index_put(
            (torch.arange(2), torch.tensor([2, 2])), gone
        )
    elif start.startswith("L"):
        gone = gone @ model.W_O[int(start[1]), 2]
    for one in heads:
        layer, head = int(one[1]), int(one[3])
        z = acts[f"blocks.{layer}.attn.hook_z"][:, :, head]
        new = reads_without(model, acts, layer, head, gone)
        gone = (z - new) @ model.W_O[layer, head]
    return f"blocks.{layer}.attn.hook_z", put((slice(None), slice(None), head), new)


PATHS = ["L1H2 > L2H3", "embed > L0H1", "embed@2 > L1H0", "0_mlp_out > L2H1",
         "embed@2 > L0H1 > L2H3", "embed > L0H2 > L1H1", "0_mlp_out > L1H0 > L2H3"]  # fmt: skip


@pytest.mark.parametrize("label", PATHS)
@pytest.mark.parametrize("with_", WITH)
def test_a_path_is_path_patching_by_hand(model, label, with_):
    replacement = trace_of(model, OTHER) if with_ == "trace" else with_
    if label.startswith("embed@2") and with_ == "mean":
        pytest.skip("the mean is taken over one position and many zeros")
    change = lf.ablate(trace_of(model), label, replacement)
    found = model.run_with_hooks(PROMPTS, fwd_hooks=change.hooks())
    hook = path_by_hand(model, label, with_)
    close(found, model.run_with_hooks(PROMPTS, fwd_hooks=[hook]))
    effects = lf.ablate(trace_of(model), [label, "L2H0"], replacement).compare(TARGET)
    close(effects.total_effect[0], wanted(model) - wanted(model, [hook]))
    assert effects.total_effect[0].abs().max() > 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_predicted_of_a_path_is_its_share(kind):
    """The patterns given, as in `expand_paths`."""
    trace = lf.trace(made(kind, "folded"), PROMPTS)
    paths = lf.expand_paths(trace, ANSWER, FOIL, top_k=None, expansions=10_000)
    labels = ["embed@5 > L0H1", "embed@2 > L0H1 > L2H3", "0_mlp_out@1 > L1H0 > L2H3"]
    wide = ["embed > L0H1", "0_mlp_out > L1H0 > L2H3"]
    effects = lf.ablate(trace, [*labels[:2], *wide, "L2H0"]).compare(TARGET)
    for row, label in enumerate(labels[:2]):
        close(effects.predicted[row], paths[label])
    for row, label in enumerate(wide, start=2):
        start, way = label.split(" > ", 1)
        each = [paths[f"{start}@{pos} > {way}"] for pos in range(PROMPTS.shape[1])]
        close(effects.predicted[row], sum(each))


@pytest.mark.parametrize("with_", WITH)
def test_several_at_once_are_hooks_at_once(model, with_):
    labels = ["L1H2", "2_mlp_out", "L2H2"]
    replacement = trace_of(model, OTHER) if with_ == "trace" else with_
    effects = lf.ablate(trace_of(model), labels, replacement).compare(TARGET)
    hooks = [by_hand(model, label, with_) for label in labels]
    close(effects.total_effect[-1], wanted(model) - wanted(model, hooks))


def test_several_in_a_row_and_all_of_them(model):
    labels = ["L2H2", "2_mlp_out", "embed@2"]
    change = lf.ablate(trace_of(model), labels)
    effects = change.compare(TARGET)
    assert effects.components == (*labels, "all of them")
    frame = effects.to_frame()
    assert frame["component"].tolist() == [one for one in effects.components for _ in range(2)]
    assert frame["prompt"].tolist() == [0, 1] * 4
    close(effects.predicted[-1], effects.predicted[:-1].sum(0))
    for row, label in enumerate(labels):
        alone = lf.ablate(trace_of(model), label).compare(TARGET)
        for name in ("predicted", "direct", "total_effect"):
            close(getattr(effects, name)[row], getattr(alone, name)[0])
    assert {name for name, _ in change.hooks()} == {PLACES[label][0] for label in labels}


def test_two_heads_of_one_layer_at_once(model):
    change = lf.ablate(trace_of(model), ["L1H0", "L1H2"])
    both = ("blocks.1.attn.hook_z", put((slice(None), slice(None), [0, 2]), 0.0))
    close(change.compare(TARGET).total_effect[-1], wanted(model) - wanted(model, [both]))


TARGETS = {
    "score": (lf.Score(2, 1, key=1, side="query"), "blocks.2.attn.hook_attn_scores", (1, -1, 1)),
    "score of a key": (lf.Score(2, 1, key=1, side="key"), "blocks.2.attn.hook_attn_scores",
                       (1, -1, 1)),
    "neuron": (lf.Neuron(2, 9), "blocks.2.mlp.hook_pre", (-1, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("label", ["L1H2", "embed@2", "0_mlp_out"])
def test_other_targets_see_what_hooks_do(model, name, label):
    target, hook, where = TARGETS[name]
    effects = lf.ablate(trace_of(model), label).compare(target)
    seen = []
    tap = (hook, lambda x, hook: seen.append(x[(slice(None), *where)]))
    for change in ([], [by_hand(model, label, "zero")]):
        model.run_with_hooks(PROMPTS, fwd_hooks=[*change, tap])
    if name == "neuron" and not effects.held:
        close(effects.total_effect[0], seen[0] - seen[1])
    if name.startswith("score") and not effects.held:
        effects.verify(1e-10)
        side = "q" if target.side == "query" else "k"
        fixed = f"blocks.2.attn.hook_{'k' if side == 'q' else 'q'}"
        clean = kept(model)[fixed]
        hooks = [by_hand(model, label, "zero"), (fixed, lambda x, hook: clean), tap]
        model.run_with_hooks(PROMPTS, fwd_hooks=hooks)
        close(effects.total_effect[0], seen[0] - seen[2])


@pytest.mark.parametrize(
    ("label", "target"),
    [
        ("L1H2", lf.Neuron(0, 9)), ("L1H2", lf.Probe(torch.ones(32), at="blocks.1.hook_resid_pre")),
        ("0_mlp_out", lf.Neuron(0, 9)), ("L2H0@1", lf.Score(2, 1, key=1, side="query")),
        ("L0H1 > L2H0", lf.Score(2, 1, key=1, side="key")), ("L2N3", lf.Score(1, 1, side="key")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_what_is_written_after_the_target_has_no_effect_on_it(kind, label, target):
    """A stream that lacks it is one that the target never reads."""
    model = made(kind, "folded")
    assert lf.ablate(trace_of(model), "embed").compare(target).total_effect.abs().max() > 0
    with pytest.raises(DataError, match=r"is written after the target reads the stream"):
        lf.ablate(trace_of(model), ["embed", label]).compare(target)


def test_the_mean_is_over_real_tokens_only():
    model, rows = made("gpt2", "folded"), [PROMPTS[0], PROMPTS[1, :3]]
    effects = lf.ablate(lf.trace(model, rows), "L2H2", "mean").compare(lf.Logit(ANSWER))
    z = [model.run_with_cache(row[None])[1]["z", 2][0, :, 2] for row in rows]
    mean = torch.cat(z).mean(0)
    for i, one in enumerate(z):
        gone = (one[-1] - mean) @ model.W_O[2, 2]
        close(effects.predicted[0, i], gone @ model.W_U[:, ANSWER])


def test_what_cannot_be_replaced_is_refused():
    trace = lf.trace(made("gpt2", "folded"), PROMPTS)
    for label, message in (
        ("L3H0", "no L3H0"), ("L0H4", "no L0H4"), ("L0N999", "no L0N999"), ("L1H2@9", "no L1H2@9"),
        ("0_b_O", "cannot be replaced"), ("b_U", "cannot be replaced"), ("L1", "cannot be"),
        ("L1H2 > L0H1", "does not come after"), ("L1H2 > L1H1", "does not come after"),
        ("1_mlp_out > L1H0", "does not come after"), ("L0H1 > 2_mlp_out", "no head|passes heads"),
        ("embed > L5H0", "no L5H0"), ("head 3", "no component is called"),
        ([], "at least one"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            lf.ablate(trace, label)
    with pytest.raises(DataError, match="positions do not match"):
        lf.ablate(trace, "L1H2", lf.trace(made("gpt2", "folded"), PROMPTS[:, :4]))
    with pytest.raises(DataError, match="one at a time"):
        lf.ablate(trace, "L1H2").compare(lf.Logit([[3, 4], [5, 6]]))
    live = lf.trace(made("gpt2", "live"), PROMPTS)
    with pytest.raises(InexactError, match="hold=True"):
        lf.ablate(live, "L1H2").compare(TARGET)


@pytest.mark.parametrize(
    ("label", "hook", "where"),
    [
        ("0_mlp_out@2", "blocks.0.hook_mlp_out", (slice(None), 2)),
        ("1_attn_out@2", "blocks.1.hook_attn_out", (slice(None), 2)),
        ("1_mlp_out@5", "blocks.1.hook_mlp_out", (slice(None), 5)),
        ("L0N9@2", "blocks.0.mlp.hook_post", (slice(None), 2, 9)),
    ],
)
@pytest.mark.parametrize("with_", WITH)
def test_a_part_at_one_position_is_replaced_there_only(label, hook, where, with_):
    model = made("gpt2", "folded")
    replacement = lf.trace(model, OTHER) if with_ == "trace" else with_
    new = {
        "zero": 0.0,
        "mean": kept(model)[hook].mean((0, 1))[where[2:]],
        "trace": kept(model, OTHER)[hook][where],
    }[with_]
    effects = lf.ablate(lf.trace(model, PROMPTS), label, replacement).compare(TARGET)
    close(effects.total_effect[0], wanted(model) - wanted(model, [(hook, put(where, new))]))
    effects.verify(1e-10)


@pytest.mark.parametrize("label", ["embed@99", "0_mlp_out@6", "embed@99 > L0H1"])
def test_a_position_that_there_is_not_is_refused(label):
    with pytest.raises(DataError):
        lf.ablate(lf.trace(made("gpt2", "folded"), PROMPTS), label)


@pytest.mark.parametrize("label", ["L0H1 > L2H3", ["L0H1 > L2H3", "embed > L0H1"]])
def test_a_path_alone_is_compared(label):
    effects = lf.ablate(lf.trace(made("gpt2", "folded"), PROMPTS), label).compare(TARGET)
    assert effects.total_effect.abs().max() > 1e-6
    effects.verify(1e-10)


def test_a_component_given_twice_is_refused():
    with pytest.raises(DataError, match="L1H2 was given more than once"):
        lf.ablate(trace_of(made("gpt2", "live")), ["L1H2", "L0H1", "L1H2"])
