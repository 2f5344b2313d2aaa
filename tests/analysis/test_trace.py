"""A forward pass as a value: counted, the model's own to the bit, and without a trace of itself."""

import contextlib
from collections import Counter

import pytest
import torch
from support.loaded import folded_model, live_model
from support.models import freeze_all
from support.questions import QUESTIONS

import lnfree_interp as lf
from lnfree_interp.errors import DataError, UnsupportedModelError

KINDS = ["gpt2", "neox", "llama-grouped", "qwen3", "gemma2-no-caps", "mistral"]
UNEQUAL = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]


@pytest.fixture
def dtype():
    return torch.float64


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@contextlib.contextmanager
def counted(model):
    """How often the embedding and each block compute, by hooks of the test's own."""
    calls = Counter()
    handles = [model.embed.register_forward_hook(lambda *_: calls.update(["embed"]))]
    for i, block in enumerate(model.blocks):
        handles.append(block.register_forward_hook(lambda *_, i=i: calls.update([i])))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


ONCE = {"embed": 1, 0: 1, 1: 1, 2: 1}


def numbers(result):
    """All tensors of a result, by name."""
    found = {k: v for k, v in vars(result).items() if isinstance(v, torch.Tensor)}
    inner = getattr(result, "contributions", None)
    return found | (numbers(inner) if inner is not None else {})


def same(found, expected):
    a, b = numbers(found), numbers(expected)
    assert a.keys() == b.keys()
    assert a
    return all(torch.equal(a[name], b[name]) for name in a)


def test_all_questions_on_one_trace_run_the_model_once(folded):
    with counted(folded) as calls:
        trace = lf.trace(folded, torch.arange(6))
        assert not calls  # nothing was asked yet
        for ask in QUESTIONS.values():
            ask(trace)
        assert calls == ONCE
        assert trace.runs == 1


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_short_call_runs_the_model_once_and_answers_the_same(folded, name):
    expected = QUESTIONS[name](lf.trace(folded, torch.arange(6)))
    with counted(folded) as calls:
        found = QUESTIONS[name](folded, torch.arange(6))
    assert max(calls.values()) == 1, calls
    assert same(found, expected)


def test_a_trace_that_keeps_what_is_asked_for_answers_the_same(folded):
    whole = lf.trace(folded, torch.arange(6))
    asked = lf.trace(folded, torch.arange(6), keep="asked")
    for ask in QUESTIONS.values():
        assert same(ask(asked), ask(whole))
    before = asked.runs
    for ask in QUESTIONS.values():
        ask(asked)
    assert asked.runs == before  # everything is there by now


def test_a_counterfactual_runs_single_blocks_only(folded):
    trace = lf.trace(folded, torch.arange(6))
    QUESTIONS["scores"](trace)
    with counted(folded) as calls:
        lf.counterfactual_pattern(trace, 2, 1, "embed").verify()
        assert calls[2] == 1  # the patched block, from the stream on
        assert calls[1] == 0
        calls.clear()
        lf.counterfactual_pattern(trace, 1, 1, ["L0H1", "0_mlp_out"]).verify()
        assert calls[1] == 1
        assert calls[2] == 0
    assert trace.runs == 1


def test_a_mean_over_text_says_what_was_held(live):
    mean = lf.mean_next_token_attribution(live, torch.arange(12).view(2, 6), hold=True)
    assert "ln_final held, which misses" in repr(mean)
    assert mean.to_frame()["held"].str.contains("misses").all()


def test_what_a_held_norm_misses_is_measured_on_single_blocks(live):
    trace = lf.trace(live, torch.arange(6), hold=True)
    with counted(live) as calls:
        lf.attribute_logits(trace, 3, 5)
        lf.attribute_neuron(trace, 1, 7)
        assert calls == ONCE
        lf.attribute_scores(trace, 2, 1)
        assert calls["embed"] == 1
        assert (calls[0], calls[1]) == (1, 1)
        assert 1 < calls[2] <= 1 + 4  # a block for each component that is measured


def test_an_ablation_runs_once_for_each_change(folded):
    trace, target = lf.trace(folded, torch.arange(6)), lf.LogitDifference(3, 5)
    trace.attribute(target)
    with counted(folded) as calls:
        lf.ablate(trace, ["L2H1", "2_mlp_out"]).compare(target)
    assert calls["embed"] == calls[0] == calls[1] == 3  # each alone, and both
    assert trace.runs == 1


def test_select_runs_nothing_and_is_the_prompt_alone(folded):
    trace = lf.trace(folded, UNEQUAL)
    trace.attribute(lf.Logit(3))
    with counted(folded) as calls:
        for i, prompt in enumerate(UNEQUAL):
            one = trace.select(i)
            assert one.single
            assert one.tokens.tolist() == [prompt]
            for name in ("logits by source", "paths", "flow", "affine", "residual", "lens"):
                found = numbers(QUESTIONS[name](one))
                for key, value in numbers(QUESTIONS[name](lf.trace(folded, prompt))).items():
                    close(found[key], value)
            assert one.runs == 0
        assert calls == dict.fromkeys(ONCE, 6 * 3)  # those of the traces that were made anew
    assert trace.select(-1).tokens.tolist() == [UNEQUAL[-1]]
    for wrong in (3, -4, True):
        with pytest.raises(DataError):
            trace.select(wrong)


def test_select_before_a_question_runs_one_prompt(folded):
    trace = lf.trace(folded, UNEQUAL)
    one = trace.select(1)
    close(lf.attribute_logits(one, 3).values, lf.attribute_logits(folded, UNEQUAL[1], 3).values)
    assert (trace.runs, one.runs) == (0, 1)


def test_free_lets_go_and_runs_again(folded):
    trace = lf.trace(folded, torch.arange(6))
    first = lf.flow_graph(trace, 3, 5)
    assert "0 activations" not in repr(trace)
    assert "0 activations" in repr(trace.free())
    with counted(folded) as calls:
        assert same(lf.flow_graph(trace, 3, 5), first)
        assert calls == ONCE
    assert trace.runs == 2


def test_free_lets_go_of_a_given_run_too(folded):
    tokens = torch.arange(6)
    given = lf.trace(folded, tokens, run=folded.run_with_cache(tokens[None]))
    first = lf.flow_graph(given, 3, 5)
    found = lf.flow_graph(given.free(), 3, 5)
    close(found.flow, first.flow)
    assert given.runs == 1


def test_what_is_kept_later_goes_to_the_device_too(folded):
    """A device that keeps shapes alone shows where each activation went."""
    trace = lf.trace(folded, torch.arange(6), keep="asked").to("meta")
    trace.need("hook_embed", "blocks.0.attn.hook_pattern")
    assert {x.device.type for x in trace._kept.values()} == {"meta"}
    assert trace.select(0)._device == "meta"


def test_on_another_device_it_still_answers(folded):
    trace = lf.trace(folded, torch.arange(6))
    first = {name: ask(trace) for name, ask in QUESTIONS.items()}
    assert trace.to("cpu") is trace
    for name, ask in QUESTIONS.items():
        assert same(ask(trace), first[name])
    assert trace.runs == 1
    assert trace["hook_embed"].device.type == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_run_with_cache_to_the_bit(kind):
    live = live_model(kind)
    tokens = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(3))
    models = [] if kind.startswith(("qwen3", "gemma")) else [live]
    for model in (*models, lf.fold(freeze_all(live))):
        logits, cache = model.run_with_cache(tokens)
        trace = lf.trace(model, tokens)
        trace.need("hook_embed")
        names = set(trace._kept)
        assert len(names) > 9 * 3
        for name in [name for name in cache if name.startswith(("hook", "blocks"))]:
            assert torch.equal(trace[name], cache[name]), name
            names.discard(name)
        assert not names  # it keeps nothing that TransformerLens does not have
        at = lf.attribute_logits(lf.trace(model, tokens, hold=True), 7)
        close(at.total, logits[:, -1, 7])


def test_what_is_no_activation_of_a_pass_is_refused_by_name(folded):
    trace = lf.trace(folded, torch.arange(6))
    for name in ("blocks.9.hook_z", "blocks.0.attn.hook_zz", "nonsense"):
        with pytest.raises(Exception, match="no hook point"):
            trace[name]


def test_a_given_run_answers_as_one_of_its_own(folded):
    tokens = torch.arange(6)[None]
    run = folded.run_with_cache(tokens)
    with counted(folded) as calls:
        given = lf.trace(folded, tokens[0], run=run)
        found = {name: ask(given) for name, ask in QUESTIONS.items()}
        assert not calls
    own = lf.trace(folded, tokens[0])
    for name, ask in QUESTIONS.items():
        expected = numbers(ask(own))
        for key, value in numbers(found[name]).items():
            close(value, expected[key])


def test_a_given_run_of_a_live_model_answers_as_one_of_its_own(live):
    tokens = torch.arange(6)[None]
    given = lf.trace(live, tokens[0], run=live.run_with_cache(tokens), hold=True)
    own = lf.trace(live, tokens[0], hold=True)
    for name in ("logits by head", "scores", "neuron", "flow", "paths", "affine"):
        expected = QUESTIONS[name](own)
        found = QUESTIONS[name](given)
        assert found.held == expected.held
        assert found.gap.relative == pytest.approx(expected.gap.relative, rel=1e-9)
        for key, value in numbers(found).items():
            close(value, numbers(expected)[key])


# Batches: several prompts at once are what each is alone

BATCHED = {
    **{
        f"logits by {by}": lambda t, by=by: lf.attribute_logits(t, 3, 5, by=by)
        for by in ("layer", "sublayer", "head", "source", "neuron")
    },
    "biases": lambda t: lf.attribute_logits(t, 3, biases=True),
    "score at the query": lambda t: t.attribute(lf.Score(2, 1, key=1, side="query")),
    "score at the key": lambda t: t.attribute(lf.Score(2, 1, key=-2, side="key"), by="source"),
    "log-odds at the query": lambda t: t.attribute(lf.LogOdds(2, 1, key=0, other=-2)),
    "log-odds at the key": lambda t: t.attribute(
        lf.LogOdds(2, 1, key=0, other=-2, side="key"), by="source"
    ),
    "neuron": lambda t: lf.attribute_neuron(t, 1, 7, pos=-2),
    "post": lambda t: lf.attribute_neuron(t, 1, 7, of="post", by="source"),
    "residual": lambda t: lf.decompose_residual(t, "blocks.2.hook_resid_mid", pos=-2),
    "residual by source": lambda t: lf.decompose_residual(t, by="source"),
    "onto": lambda t: lf.decompose_residual(t, onto=torch.arange(32.0), pos=1),
    "paths": lambda t: lf.expand_paths(t, 3, 5, top_k=None, expansions=10_000),
    "paths by source": lambda t: lf.expand_paths(t, 3, 5, by="source", top_k=None),
    "paths of a score": lambda t: lf.expand_paths(
        t, lf.Score(2, 1, key=1, side="key"), top_k=None, expansions=10_000
    ),
    "affine": lambda t: lf.affine_map(t, 3, 5).contributions,
    "affine of log-odds": lambda t: (
        lf.affine_map(t, lf.LogOdds(2, 1, key=0, other=-2, side="key")).contributions
    ),
}


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_prompts_of_unequal_length_are_what_each_is_alone(kind, name):
    if kind == "llama-grouped" and name == "post":
        pytest.skip("as for gpt2")
    model = folded_model(kind)
    batch = BATCHED[name](lf.trace(model, UNEQUAL)).verify()
    for i, prompt in enumerate(UNEQUAL):
        alone, one = BATCHED[name](lf.trace(model, prompt)), batch.select(prompt=i)
        close(one.total, alone.total)
        rows = dict(zip(one.labels, one.values, strict=True))
        for label, value in zip(alone.labels, alone.values, strict=True):
            close(rows.pop(label), value)
        assert not any(value.any() for value in rows.values())  # what another prompt has
        assert one.prompts == alone.prompts


def test_scores_of_unequal_prompts_are_what_each_is_alone(folded):
    batch = lf.attribute_scores(lf.trace(folded, UNEQUAL), 2, 1).verify()
    for i, prompt in enumerate(UNEQUAL):
        alone, one = lf.attribute_scores(folded, prompt, 2, 1), batch.select(prompt=i)
        n = len(prompt)
        assert one.query == alone.query == (n - 1,)
        close(one.values[..., :n], alone.values)
        close(one.total[:n], alone.total)
        close(one.log_pattern[:n], alone.log_pattern)
        assert not one.values[..., n:].any()
        assert not one.total[n:].any()
        assert one.log_pattern[n:].isneginf().all()
        close(one.log_odds(0, 1).values, alone.log_odds(0, 1).values)
        close(one.by_key().values[:, :n], alone.by_key().values)


@pytest.mark.parametrize("by", ["head", "neuron", "source", "sublayer"])
def test_flow_of_unequal_prompts_is_what_each_is_alone(folded, by):
    # Edges between neurons grow with the square of the length.
    prompts = [p[-3 + i :] for i, p in enumerate(UNEQUAL[:2])] if by == "neuron" else UNEQUAL
    batch = lf.flow_graph(lf.trace(folded, prompts), 3, 5, by=by, top_k=None).verify()
    for i, prompt in enumerate(prompts):
        alone = lf.flow_graph(folded, prompt, 3, 5, by=by, top_k=None)
        one = batch.select(i)
        nodes, edges = ({n.name: n for n in one.nodes}, {(e.source, e.target): e.flow
                        for e in one.edges})  # fmt: skip
        for node in alone.nodes:
            twin = nodes.pop(node.name)
            for field in ("flow", "from_biases", "from_rest", "to_rest"):
                assert abs(getattr(twin, field) - getattr(node, field)) < 1e-10
        assert all(abs(node.flow) == 0 for node in nodes.values())
        for edge in alone.edges:
            assert abs(edges.pop((edge.source, edge.target)) - edge.flow) < 1e-10
        assert all(abs(flow) == 0 for flow in edges.values())


@pytest.mark.parametrize(
    "label",
    ["L1H2", "L1H2@1", "L1N7", "0_mlp_out", "0_mlp_out@1", "embed@1", "L0H1 > L2H0"],
)
def test_ablations_of_unequal_prompts_are_what_each_is_alone(folded, label):
    batch = lf.ablate(lf.trace(folded, UNEQUAL), label).compare(lf.Logit(3)).verify()
    for i, prompt in enumerate(UNEQUAL):
        alone = lf.ablate(folded, prompt, label).compare(lf.Logit(3))
        for name in ("predicted", "direct", "total_effect"):
            close(getattr(batch, name)[:, i], getattr(alone, name)[:, 0])


# Nothing is left behind


def _locked(instance, written):
    """An object that notes what is written to it, even for a moment."""

    class Locked(type(instance)):
        def __setattr__(self, name, value):
            written.append(name)
            super().__setattr__(name, value)

    instance.__class__ = Locked


def _hooks(model):
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        or getattr(module, "fwd_hooks", None)
    ]  # fmt: skip


def test_nothing_is_written_to_config_or_tokenizer_and_no_hook_is_left(folded):
    written = []
    cfgs = {id(m.cfg): m.cfg for m in folded.modules() if hasattr(m, "cfg")}
    for cfg in cfgs.values():
        _locked(cfg, written)
    tokenizer = []
    _locked(folded.tokenizer, tokenizer)
    before = {name: repr(value) for name, value in vars(folded.cfg).items()}
    state = {name: value.clone() for name, value in folded.state_dict().items()}
    for ask in QUESTIONS.values():
        ask(folded, "for i in range")
        ask(lf.trace(folded, "for i in range", prepend_bos=False))
        ask(lf.trace(folded, "for i in range", prepend_bos=True))
    trace = lf.trace(folded, "for i in range")
    lf.counterfactual_pattern(trace, 2, 1, "L0H1")
    lf.ablate(trace, ["L2H1", "L0H1 > L2H3"]).compare(lf.Logit(3))
    lf.certify(folded, "for i in range")
    assert written == []
    assert not {"padding_side", "bos_token", "add_bos_token", "pad_token"} & set(tokenizer)
    assert before == {name: repr(value) for name, value in vars(folded.cfg).items()}
    assert _hooks(folded) == []
    for name, value in folded.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_that_fails_in_the_middle_leaves_nothing(folded, name, monkeypatch):
    trace = lf.trace(folded, torch.arange(6))
    right = folded.blocks[1].mlp.forward

    def broken(x):
        right(x)
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(folded.blocks[1].mlp, "forward", broken)
        with pytest.raises(RuntimeError, match="in the middle"):
            QUESTIONS[name](trace)
    assert _hooks(folded) == []
    assert folded.cfg.default_prepend_bos is True
    assert torch.is_grad_enabled()
    assert same(QUESTIONS[name](trace), QUESTIONS[name](lf.trace(folded, torch.arange(6))))


def test_an_intervention_that_fails_in_the_middle_leaves_nothing(folded, monkeypatch):
    trace = lf.trace(folded, torch.arange(6))
    change = lf.ablate(trace, ["L0H1"])
    with monkeypatch.context() as patch:
        patch.setattr(folded.blocks[2].attn, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            change.compare(lf.Logit(3))
    assert _hooks(folded) == []
    change.compare(lf.Logit(3)).verify()


def test_hooks_of_the_user_stay(folded):
    seen = []
    folded.add_hook("blocks.1.hook_resid_pre", lambda x, hook: seen.append(x.shape))
    lf.attribute_logits(folded, torch.arange(6), 3).verify()
    assert seen
    assert len(folded.hook_dict["blocks.1.hook_resid_pre"].fwd_hooks) == 1


def test_a_hook_that_the_model_lacks_or_does_not_reach_is_named():
    traced = lf.trace(live_model("gpt2", torch.float32), [5, 6, 7])
    with pytest.raises(UnsupportedModelError, match=r"no hook point blocks\.0\.hook_typo"):
        traced["blocks.0.hook_typo"]
    with pytest.raises(DataError, match=r"does not reach blocks\.1\.attn\.hook_result"):
        traced["blocks.1.attn.hook_result"]
    assert traced["blocks.1.attn.hook_z"].shape[1] == 3
