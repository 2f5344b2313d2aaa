"""Several threads on one model: each gets its own answers, and nobody's hooks or settings."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lnfree_interp as lf
from lnfree_interp.models.running import listening

ROUNDS, THREADS = 20, 4
TEXTS = ["def add(self, other", "for i in range(", "return", "print(i)\n    return self"]


@pytest.fixture
def dtype():
    return torch.float64


def at_once(tasks, rounds=ROUNDS):
    """Every task in a thread of its own, started together, round after round."""
    together = threading.Barrier(len(tasks))

    def repeat(task):
        found = []
        try:
            for _ in range(rounds):
                together.wait()
                found.append(task())
        except BaseException:
            together.abort()  # else the others would wait for ever
            raise
        return found

    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(repeat, task) for task in tasks]
    errors = [future.exception() for future in futures if future.exception()]
    if errors:  # that of the task that failed, before those of the others
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return [future.result() for future in futures]


def same(a, b):
    pairs = [(x, getattr(b, name)) for name, x in vars(a).items() if isinstance(x, torch.Tensor)]
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


ASKS = {
    "logits": lambda model, text, bos: lf.attribute_logits(
        lf.trace(model, text, prepend_bos=bos), "r", "e", by="neuron"
    ),
    "scores": lambda model, text, bos: lf.attribute_scores(
        lf.trace(model, text, prepend_bos=bos), 2, 1
    ),
    "flow": lambda model, text, bos: lf.flow_graph(lf.trace(model, text, prepend_bos=bos), "r"),
    "pattern": lambda model, text, bos: lf.counterfactual_pattern(
        lf.trace(model, text, prepend_bos=bos), 2, 1, "L0H1"
    ),
    "effects": lambda model, text, bos: lf.ablate(
        lf.trace(model, text, prepend_bos=bos), ["L0H1", "embed"]
    ).compare(lf.Logit("r")),
}


@pytest.mark.parametrize("name", ASKS)
def test_different_prompts_at_once_have_their_serial_answers(folded, name):
    settings = [(text, bool(i % 2)) for i, text in enumerate(TEXTS)]
    expected = [ASKS[name](folded, *one) for one in settings]
    rounds = ROUNDS if name in ("logits", "scores") else 8
    found = at_once([lambda one=one: ASKS[name](folded, *one) for one in settings], rounds)
    for answers, one in zip(found, expected, strict=True):
        assert len(answers) == rounds
        for answer in answers:
            answer.verify()
            assert same(answer, one)
            assert answer.prompts == one.prompts
    assert folded.cfg.default_prepend_bos is True
    assert folded.tokenizer.padding_side == "right"
    assert not any(module._forward_hooks for module in folded.modules())


def test_different_questions_at_once_have_their_serial_answers(folded):
    asks = list(ASKS.values())[:THREADS]
    expected = [ask(folded, TEXTS[0], True) for ask in asks]
    found = at_once([lambda ask=ask: ask(folded, TEXTS[0], True) for ask in asks])
    for answers, one in zip(found, expected, strict=True):
        assert all(same(answer, one) for answer in answers)


def test_short_calls_at_once_leave_the_setting_of_the_model(folded):
    folded.cfg.default_prepend_bos = False
    expected = [lf.attribute_logits(folded, text, "r") for text in TEXTS]
    found = at_once([lambda text=text: lf.attribute_logits(folded, text, "r") for text in TEXTS])
    for answers, one in zip(found, expected, strict=True):
        assert all(same(answer, one) for answer in answers)
    assert folded.cfg.default_prepend_bos is False


def test_one_trace_asked_by_several_threads(folded):
    """What the threads share may be run more than once, and never half kept."""
    for _ in range(5):
        trace = lf.trace(folded, TEXTS)
        expected = lf.attribute_logits(lf.trace(folded, TEXTS), "r")
        found = at_once([lambda t=trace: lf.attribute_logits(t, "r")] * THREADS, rounds=2)
        assert all(same(answer, expected) for answers in found for answer in answers)


def test_a_hook_that_is_half_removed_does_not_disturb_another_thread(folded):
    """torch removes a hook in two steps; another thread's pass may come in between."""
    point, seen = folded.blocks[1].hook_resid_pre, []
    tokens = torch.arange(6)[None]
    with listening([(point, lambda args, kwargs, output: output * 0)]):
        point._forward_hooks_with_kwargs.clear()
        user = threading.Thread(target=lambda: seen.append(folded(tokens)))
        user.start()
        user.join()
    assert torch.equal(seen[0], folded(tokens))


def test_a_run_of_the_users_own_is_not_captured(folded):
    """The user's thread runs in the middle of ours: from a hook that only we trigger."""
    tokens, other = torch.arange(6), torch.arange(50, 61)[None]
    expected = lf.attribute_logits(folded, tokens, 3, by="neuron")
    run_in_between, seen = [], []
    right = folded.blocks[1].forward

    def meanwhile(*args, **kwargs):
        if threading.current_thread() is threading.main_thread() and not run_in_between:
            run_in_between.append(True)
            user = threading.Thread(target=lambda: seen.append(folded(other)))
            user.start()
            user.join()
        return right(*args, **kwargs)

    folded.blocks[1].forward = meanwhile
    found = lf.attribute_logits(folded, tokens, 3, by="neuron").verify()
    del folded.blocks[1].forward
    assert run_in_between
    assert same(found, expected)
    assert torch.equal(seen[0], folded(other))


def test_runs_of_the_users_own_beside_ours_are_what_they_are_alone(folded):
    tokens = torch.arange(50, 61)[None]
    logits = folded(tokens).detach()
    expected = lf.attribute_scores(folded, TEXTS[0], 2, 1)
    user = lambda: folded(tokens).detach()  # noqa: E731
    ours = lambda: lf.attribute_scores(folded, TEXTS[0], 2, 1)  # noqa: E731
    found = at_once([user, ours, user, ours])
    for row in (0, 2):
        assert all(torch.equal(one, logits) for one in found[row])
    for row in (1, 3):
        assert all(same(one, expected) for one in found[row])
