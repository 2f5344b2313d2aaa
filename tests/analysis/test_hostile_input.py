"""Input that looks right and is not: refused with a reason, or answered as if it were not there."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from support import questions
from support.loaded import folded_model, live_model
from support.models import freeze_all, make_gpt2, make_tokenizer
from torch import nn
from transformer_lens.hook_points import HookPoint

import lnfree_interp as lf
from lnfree_interp.errors import DataError, InexactError, UnsupportedModelError

TOKENS = torch.tensor([11, 12, 13, 14, 15, 16])


@pytest.fixture
def dtype():
    return torch.float64


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


# Padding read as text

QUESTIONS = {
    "logits": lambda *of: lf.attribute_logits(*of, 3),
    "by source": lambda *of: lf.attribute_logits(*of, 3, by="source"),
    "scores": lambda *of: lf.attribute_scores(*of, 1, 2),
    "one score": lambda *of: lf.attribute(*of, lf.Score(1, 2, side="query")),
    "log-odds": lambda *of: lf.attribute(*of, lf.LogOdds(1, 2, 1, 0)),
    "flow": lambda *of: lf.flow_graph(*of, 3),
    "paths": lambda *of: lf.expand_paths(*of, 3),
    "affine": lambda *of: lf.affine_map(*of, 3),
    "neuron": lambda *of: lf.attribute_neuron(*of, 1, 7),
    "residual": lambda *of: lf.decompose_residual(*of),
    "probe": lambda *of: lf.attribute(*of, lf.Probe(torch.ones(32))),
    "ablation": lambda *of: lf.ablate(*of, "L0H1"),
}
CONTAINERS = {
    "batch": lambda t: t,
    "list": list,
    "tuple": tuple,
    "one row": lambda t: t[0],
    "a batch of one": lambda t: t[:1],
    "nested lists": lambda t: t.tolist(),
    "a list of a row": lambda t: t[0].tolist(),
    "array": lambda t: t.numpy(),
    "every row": lambda t: t[[0, 0, 0]],
}


def padded(pad, side, how_many):
    row, other = [5, 6, 7, 8], [9] * (4 + how_many)
    filled = row + [pad] * how_many if side == "right" else [pad] * how_many + row
    return torch.tensor([filled, other])


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("own", [False, True], ids=["pad is eos", "a pad of its own"])
def test_padding_in_any_container_is_refused(folded, name, own):
    if own:
        folded.tokenizer.pad_token = folded.tokenizer.convert_ids_to_tokens(250)
    else:
        folded.tokenizer.pad_token = folded.tokenizer.eos_token
    pad = folded.tokenizer.pad_token_id
    cases = [("right", 1), ("right", 3), ("right", 9), ("left", 2), ("left", 9)]
    for side, how_many in [*cases, *([("left", 1)] if own else [])]:
        for container in CONTAINERS.values():
            given = container(padded(pad, side, how_many))
            with pytest.raises(DataError, match="attention_mask"):
                QUESTIONS[name](folded, given)
            with pytest.raises(DataError, match="attention_mask"):
                QUESTIONS[name](lf.trace(folded, given))


def test_padding_in_a_given_run_is_refused(folded):
    folded.tokenizer.pad_token = folded.tokenizer.eos_token
    tokens = padded(folded.tokenizer.pad_token_id, "right", 3)
    trace = lf.trace(folded, tokens, run=folded.run_with_cache(tokens))
    with pytest.raises(DataError, match="attention_mask"):
        lf.attribute_logits(trace, 3)


def test_a_prompt_beside_a_padded_one_can_be_asked_alone(folded):
    folded.tokenizer.pad_token = folded.tokenizer.eos_token
    tokens = padded(folded.tokenizer.pad_token_id, "right", 3)
    lf.attribute_logits(lf.trace(folded, tokens).select(1), 3).verify()


MASKS = {
    "tensor": lambda m: m,
    "bool": lambda m: m.bool(),
    "float": lambda m: m.float(),
    "list": lambda m: m.tolist(),
    "array": lambda m: m.numpy(),
    "bool array": lambda m: m.bool().numpy(),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_of_any_kind_takes_padding_off(folded, kind, side):
    folded.tokenizer.pad_token = folded.tokenizer.eos_token
    tokens = padded(folded.tokenizer.pad_token_id, side, 3)
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    trace = lf.trace(folded, tokens, attention_mask=MASKS[kind](mask))
    assert trace.lengths == (4, 7)
    for name in ("logits", "flow", "paths", "neuron"):
        QUESTIONS[name](trace).verify()
    alone = lf.attribute_logits(folded, [5, 6, 7, 8], 3)
    close(lf.attribute_logits(trace, 3).select(0).values, alone.values)
    one = lf.trace(folded, tokens[0], attention_mask=MASKS[kind](mask[0]))
    assert one.single
    close(lf.attribute_logits(one, 3).values, alone.values)
    text = lf.trace(folded, tokens, attention_mask=MASKS[kind](torch.ones_like(mask)))
    assert text.lengths == (7, 7)
    lf.attribute_logits(text, 3).verify()


def test_ids_and_mask_as_a_tokenizer_returns_them(folded):
    folded.tokenizer.pad_token = folded.tokenizer.eos_token
    both = folded.tokenizer(["for i", "def add(self, other):"], padding=True)
    trace = lf.trace(folded, both["input_ids"], attention_mask=both["attention_mask"])
    lf.attribute_logits(trace, 3).verify()


def test_wrong_masks_are_refused(folded):
    rows = torch.stack([TOKENS, TOKENS])
    for mask in (
        torch.ones(3, 6), torch.ones(2, 5), torch.zeros(2, 6), torch.full((2, 6), 2),
        torch.full((2, 6), float("nan")), torch.tensor([[1, 1, 0, 1, 1, 1]] * 2), "mask",
        [[1], [1]], object(), torch.ones(2, 6, 1), [[1] * 6, [1] * 5],
    ):  # fmt: skip
        with pytest.raises(DataError):
            lf.trace(folded, rows, attention_mask=mask)
    with pytest.raises(DataError, match="token ids"):
        lf.trace(folded, "for i in", attention_mask=[1, 1, 1])


# Numbers of other libraries, empty batches, other types


@pytest.mark.parametrize(
    "number", [int, np.int64, np.int32, np.uint8, torch.tensor], ids=lambda f: f.__name__
)
def test_numbers_of_any_library_are_numbers(folded, number):
    one, two = number(1), number(2)
    asks = (
        lambda a, b: lf.attribute_scores(folded, TOKENS, b, a, query=b),
        lambda a, b: lf.attribute_scores(folded, TOKENS, b, a, keys=[a, b]),
        lambda a, b: lf.attribute_scores(folded, TOKENS, b, a, keys=b),
        lambda a, b: lf.attribute_scores(folded, TOKENS, b, a).select(key=b),
        lambda a, b: lf.attribute_scores(folded, TOKENS, b, a).log_odds(a, b),
        lambda a, b: lf.attribute(folded, TOKENS, lf.Score(b, a, b, a, "key")),
        lambda a, b: lf.attribute(folded, TOKENS, lf.LogOdds(b, a, a, b)),
        lambda a, b: lf.attribute_neuron(folded, TOKENS, a, b, pos=b),
        lambda a, b: lf.attribute_logits(folded, TOKENS, a, b),
        lambda a, b: lf.attribute(folded, TOKENS, lf.Logit(a, pos=b)),
        lambda a, b: lf.decompose_residual(folded, TOKENS, pos=b),
        lambda a, b: lf.attribute_logits(folded, torch.stack([TOKENS] * 3), 3).select(b),
        lambda a, b: lf.attribute_logits(folded, TOKENS, [a, b]).select(answer=a),
    )
    for ask in asks:
        found, expected = ask(one, two), ask(1, 2)
        close(found.values, expected.values)
        assert found.of == expected.of if hasattr(found, "of") else True
    assert len(lf.attribute_logits(folded, TOKENS, 3).top(two)) == 2
    assert lf.trace(folded, [TOKENS, TOKENS]).select(one).single
    close(lf.ov_table(folded, two, one).row(3), lf.ov_table(folded, 2, 1).row(3))
    close(lf.flip_distances(folded, TOKENS, int(two), "L0H1", pos=two).pre,
          lf.flip_distances(folded, TOKENS, 2, "L0H1", pos=2).pre)  # fmt: skip
    cf = lf.counterfactual_pattern(folded, TOKENS, two, one, "embed")
    close(cf.pattern, lf.counterfactual_pattern(folded, TOKENS, 2, 1, "embed").pattern)


def test_keys_in_an_array(folded):
    found = lf.attribute_scores(folded, TOKENS, 2, 1, keys=np.array([1, 3]))
    assert found.keys == (1, 3)


@pytest.mark.parametrize(
    "empty",
    [[], (), [[]], [[], [3]], torch.empty(0, dtype=torch.long), torch.empty(0, 4, dtype=torch.long),
     torch.empty(4, 0, dtype=torch.long), np.zeros((0, 3)), [torch.empty(0, dtype=torch.long)],
     torch.empty(0)],
    ids=str,
)  # fmt: skip
def test_nothing_is_refused(folded, empty):
    with pytest.raises(DataError, match="empty"):
        lf.trace(folded, empty)
    for ask in QUESTIONS.values():
        with pytest.raises(DataError, match="empty"):
            ask(folded, empty)


@pytest.mark.parametrize(
    "wrong",
    [[1.5], [None], [1, None], [True, False], [[1, 2], [3.5, 1]], torch.tensor(3), torch.ones(3),
     torch.ones(2, 2, 2).long(), [torch.ones(2, 2).long()], [3, "for"], [{"a": 1}], [-1, 3],
     [300], np.array(["a"]), [1 + 2j]],
    ids=str,
)  # fmt: skip
def test_what_is_no_prompt_is_refused(folded, wrong):
    with pytest.raises(DataError):
        lf.trace(folded, wrong)


def test_what_is_no_model_or_answer_is_refused(folded):
    with pytest.raises(UnsupportedModelError, match="not a Linear"):
        lf.trace(nn.Linear(2, 2), TOKENS)
    for wrong in (True, "", " for i", [], [[3]] * 2, [3.5], [None], -1, 300, np.int64(300)):
        with pytest.raises(DataError):
            lf.attribute_logits(folded, TOKENS, wrong)
    with pytest.raises(DataError, match="give the prompt"):
        lf.attribute_logits(folded)


def test_a_text_without_a_tokenizer_is_refused(folded):
    folded.tokenizer = None
    with pytest.raises(DataError, match="no tokenizer"):
        lf.attribute_logits(folded, "for i", 3)
    found = lf.attribute_logits(folded, TOKENS, 3).verify()
    assert found.prompts[0][0] == "<11>"


# Autocast, an attached module, low precision


@cache
def free_in_float32():
    return folded_model("gpt2", torch.float32, tokenizer=True)


SAME = {
    **QUESTIONS,
    "ablation": lambda *of: lf.ablate(*of, ["L0H1", "2_mlp_out"]),
    "next tokens": lambda *of: lf.attribute_next_tokens(*of),
    "lens": lambda *of: lf.logit_lens(*of),
    "pattern": lambda *of: lf.counterfactual_pattern(*of, 2, 1, "embed"),
    "flips": lambda *of: lf.flip_distances(*of, 1, "L0H1"),
    "trace": lambda model, tokens: lf.attribute_logits(lf.trace(model, tokens), 3),
}


def tensors(result):
    found = {k: v for k, v in vars(result).items() if isinstance(v, torch.Tensor)}
    inner = getattr(result, "contributions", None)
    return found if inner is None else found | tensors(inner)


@pytest.mark.parametrize("name", SAME)
def test_autocast_changes_no_number(name):
    model = free_in_float32()
    expected = SAME[name](model, TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SAME[name](model, TOKENS)
    if name == "ablation":
        found, expected = (tensors(x.compare(lf.Logit(3))) for x in (found, expected))
    else:
        found, expected = tensors(found), tensors(expected)
    assert found
    for key, value in found.items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(
            lambda m: lf.ablate(m, TOKENS, "L0H1").compare(lf.Logit(3)).direct,
            id="compare"),
        pytest.param(lambda m: lf.ablate(m, TOKENS, "L0H1").run(), id="run"),
        pytest.param(lambda m: lf.ov_table(m, 1, 2).row(3), id="OV table"),
        pytest.param(lambda m: lf.qk_table(m, 1, 2).row(3), id="QK table"),
        pytest.param(lambda m: lf.bigram_table(m).row(3), id="bigrams"),
        pytest.param(lambda m: lf.virtual_weights(m, "L0H1", "L1H2", "Q").A,
                     id="virtual weights"),
        pytest.param(lambda m: lf.mean_next_token_attribution(m, TOKENS[None]).mean, id="means"),
    ],
)  # fmt: skip
def test_autocast_changes_no_number_elsewhere(ask):
    model = free_in_float32()
    expected = ask(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ask(model)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


class Sae(nn.Module):
    """What an attached dictionary is to a hook point: a module in its place."""

    def __init__(self):
        super().__init__()
        self.name = "not a hook point"

    def forward(self, x):
        return 0.5 * x


AT = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.0.mlp.hook_post",
      "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post", "hook_embed",
      "blocks.1.hook_attn_out"]  # fmt: skip


def attached(model, at):
    parent, _, leaf = at.rpartition(".")
    owner = model.get_submodule(parent)
    assert isinstance(getattr(owner, leaf), HookPoint)
    setattr(owner, leaf, Sae())
    return model


@pytest.mark.parametrize("at", AT)
def test_an_attached_module_is_refused_by_name(folded, at):
    attached(folded, at)
    trace = lf.trace(folded, TOKENS)
    for name in ("logits", "scores", "flow", "paths", "neuron", "residual"):
        with pytest.raises(UnsupportedModelError, match=rf"a Sae is attached at {at}"):
            QUESTIONS[name](trace)


def test_an_attached_module_is_refused_by_name_in_a_short_call():
    live = live_model("gpt2", tokenizer=True)
    missed = []
    for at in AT:
        model = attached(lf.fold(freeze_all(live)), at)
        for name in ("logits", "scores", "flow", "paths", "neuron", "residual"):
            try:
                QUESTIONS[name](model, TOKENS)
                missed.append((at, name))
            except UnsupportedModelError as error:
                missed += [] if at in str(error) else [(at, name)]
    assert not missed


def test_a_model_in_bfloat16_is_judged_by_bfloat16():
    model = free_in_float32()
    low = folded_model("gpt2", torch.float32, tokenizer=True)
    low.to(torch.bfloat16, print_details=False)
    for name, ask in SAME.items():
        found = ask(low, TOKENS)
        found = found.compare(lf.Logit(3)) if name == "ablation" else found
        assert found.error.dtype == torch.bfloat16, name
        found.verify()
    found, exact = (lf.attribute_logits(m, TOKENS, 3, by="sublayer") for m in (low, model))
    assert found.values.dtype == torch.bfloat16
    torch.testing.assert_close(found.values.float(), exact.values, rtol=0.1, atol=0.05)
    with pytest.raises(InexactError):
        found.verify(1e-10)


@pytest.mark.filterwarnings("ignore::lnfree_interp.errors.HeldWarning")
@pytest.mark.parametrize("name", questions.QUESTIONS)
@pytest.mark.parametrize("form", ["live", "first"])
def test_scales_of_tokens_leave_bfloat16_what_it_is(form, name):
    """Norms compute their scales in float32."""
    if (form, name) == ("live", "flips"):
        pytest.skip("flip distances are products of weights: no live norm can be held")
    low = lf.load(make_gpt2(), tokenizer=make_tokenizer(), check=False, dtype=torch.bfloat16)
    if form == "first":
        low = lf.with_norm_sites(low)
        for site in lf.list_norm_sites(low):
            lf.freeze_site(low, site, 2.0, first=5.0)
    found = questions.QUESTIONS[name](lf.trace(low, TOKENS, hold=form == "live")).verify()
    assert found.error.dtype == torch.bfloat16
    reads_no_norm = ("residual", "probe", "mean of a probe")
    assert bool(found.held) == (form == "live" and name not in reads_no_norm)


# Log-odds certificates: no false alarms, and a wrong one is seen


def pairs(n, generator):
    """Random heads, queries, and two keys that the query sees."""
    for _ in range(n):
        layer, head = (int(torch.randint(k, (), generator=generator)) for k in (3, 4))
        query = int(torch.randint(1, 20, (), generator=generator))
        keys = torch.randperm(query + 1, generator=generator)[:2].tolist()
        yield layer, head, query, keys


@pytest.mark.parametrize("enlarged", [1.0, 30.0, 300.0, 3000.0])
@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_log_odds_of_float32_give_no_false_alarm(kind, enlarged):
    live = live_model(kind, torch.float32)
    model = lf.fold(freeze_all(live))
    with torch.no_grad():
        for block in model.blocks:
            for name in ("W_Q", "b_Q"):
                weight = getattr(block.attn, f"_{name}", None)
                weight = getattr(block.attn, name) if weight is None else weight
                weight.mul_(enlarged)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(300, (20,), generator=generator)
    trace, alarms, underflow = lf.trace(model, tokens), [], 0
    for layer, head, query, (key, other) in pairs(125, generator):
        pattern = trace.act("pattern", layer)[0, head, query]
        underflow += int(pattern[[key, other]].min() == 0)
        scores = lf.attribute_scores(trace, layer, head, query)
        found = [scores.log_odds(key, other)]
        found += [trace.attribute(lf.LogOdds(layer, head, key, other, query, side))
                  for side in ("query", "key")]  # fmt: skip
        alarms += [(layer, head, query, key, other, str(one.error))
                   for one in found if not one.certificate.holds]  # fmt: skip
        assert all(one.total.isfinite().all() for one in found)
    assert not alarms
    assert underflow > 10 or enlarged < 1000


def test_wrong_log_odds_are_an_alarm():
    found = lf.attribute_scores(free_in_float32(), TOKENS, 2, 1).log_odds(1, 3)
    found.verify()
    with pytest.raises(InexactError):
        replace(found, total=found.total + 1e-3).verify()


def test_architectures_whose_sums_are_not_plain_are_refused():
    """TransformerLens runs them; what their sublayers write is no sum of heads and neurons."""
    for setting, what in (
        ({"original_architecture": "Olmo2ForCausalLM"}, "norms after the sublayers only"),
        ({"clip_qkv": 8.0}, "clipped queries, keys and values"),
        ({"use_attention_sinks": True}, "attention sinks"),
    ):
        model = live_model("llama", torch.float32)
        for name, value in setting.items():
            setattr(model.cfg, name, value)
        with pytest.raises(UnsupportedModelError, match=what):
            lf.trace(model, TOKENS, hold=True)


def test_a_negative_key_is_one_position_of_equally_long_prompts():
    model = folded_model("gpt2", torch.float32)
    long, short = TOKENS[:6], TOKENS[:4]
    with pytest.raises(DataError, match="another position in each of these prompts"):
        lf.attribute(lf.trace(model, [long, short]), lf.Score(1, 1, key=-1))
    alone = lf.attribute(lf.trace(model, short), lf.Score(1, 1, key=-1))
    both = lf.attribute(lf.trace(model, [short, short.flip(0)]), lf.Score(1, 1, key=-1))
    torch.testing.assert_close(both.select(prompt=0).total, alone.total)
