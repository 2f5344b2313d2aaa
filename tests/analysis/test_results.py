"""Results behave alike: subtracted, averaged, selected by name, saved and read."""

import json
import pickle
import struct
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from safetensors.torch import save_file

import lnfree_interp as lf
from lnfree_interp.errors import DataError, HeldWarning, InexactError, OutputError

CLEAN, CORRUPT = torch.tensor([11, 12, 13, 14, 15, 16]), torch.tensor([11, 12, 33, 14, 15, 16])
BATCH = torch.stack([CLEAN, CORRUPT, CLEAN.flip(0)])


@pytest.fixture
def dtype():
    return torch.float64


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def every_result(model, hold):
    """Every type of result, of one prompt and of several where it takes them."""
    one, some = lf.trace(model, CLEAN, hold=hold), lf.trace(model, BATCH, hold=hold)
    scores = lf.attribute_scores(some, 2, 1)
    found = {
        "logits": lf.attribute_logits(one, 3, 5),
        "logits of a batch": lf.attribute_logits(some, [[3, 4]] * 3, [[5, 6]] * 3, by="source"),
        "next tokens": lf.attribute_next_tokens(some, by="neuron"),
        "difference": lf.attribute_logits(one, 3, 5) - lf.attribute_logits(one, 7, 5),
        "mean": lf.attribute_logits(some, 3, 5).mean(),
        "scores": lf.attribute_scores(one, 2, 1, keys=[1, 3]),
        "scores of a batch": scores,
        "by query": scores.by_query(),
        "log-odds": scores.log_odds(1, 0),
        "neuron": lf.attribute_neuron(one, 2, 7, of="post"),
        "residual": lf.decompose_residual(some, pos=slice(1, 4)),
        "affine": lf.affine_map(one, 3, 5),
        "affine of a batch": lf.affine_map(some, 3, 5),
        "paths": lf.expand_paths(one, 3, 5),
        "paths of a batch": lf.expand_paths(some, 3, 5),
        "flow": lf.flow_graph(one, 3, 5),
        "flow of a batch": lf.flow_graph(some, 3, 5),
        "lens": lf.logit_lens(some),
        "pattern": lf.counterfactual_pattern(one, 2, 1, ["embed", "L0H1"]),
        "effects": lf.ablate(some, ["L2H1", "embed@1"], "mean").compare(lf.Logit(3)),
        "mean over text": lf.mean_next_token_attribution(model, BATCH, hold=hold),
    }
    if not hold:
        found["flips"] = lf.flip_distances(one, 2, "L0H1")
        found["additivity"] = lf.direct_effect_additivity(model, BATCH, ["L0H1"], ["L2H3"])
    return found


def same(a, b):
    """Whether two results are equal, to the bit, field by field."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)
        )
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("hold", [False, True], ids=["free", "held"])
def test_every_result_is_saved_and_read_as_it_was(folded, live, hold, tmp_path):
    for name, result in every_result(live if hold else folded, hold).items():
        path = result.save(tmp_path / f"{name}.safetensors")
        assert path.is_absolute()
        again = lf.load_result(path)
        assert same(again, result), name
        assert again.certificate.identity == result.certificate.identity
        assert again.error.dtype == result.error.dtype
        # A sum is summed anew, in the order of another memory.
        assert again.error.relative == pytest.approx(result.error.relative, abs=1e-14)
        assert getattr(again, "prompts", None) == getattr(result, "prompts", None)
        if hold and name != "residual":
            assert again.held == result.held != (), name
            assert again.gap == result.gap
            assert again.gap.relative > 1e-4
            if name != "effects":
                with pytest.warns(HeldWarning):
                    again.verify()
        else:
            again.verify()
        with pytest.raises(OutputError):
            result.save(path)  # it is not overwritten
        result.save(str(path) + ".again")


def test_a_saved_result_holds_no_pickle(folded, tmp_path):
    path = lf.attribute_logits(folded, CLEAN, 3).save(tmp_path / "one")
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    assert json.loads(header["__metadata__"]["lnfree_result"])["type"] == "Contributions"
    assert pickle.PROTO + b"\x04" not in raw


def rewritten(path, change):
    """The file with another header, its tensors as they are."""
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    plain = change(json.loads(header["__metadata__"]["lnfree_result"]))
    header["__metadata__"]["lnfree_result"] = plain if isinstance(plain, str) else json.dumps(plain)
    text = json.dumps(header).encode()
    new = path.with_name("tampered")
    new.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])
    return new


def _with(plain, **changed):
    return plain | {"fields": plain["fields"] | changed}


TAMPERED = {
    "another type": lambda p: p | {"type": "Trace"},
    "a function": lambda p: p | {"type": "load"},
    "a module": lambda p: p | {"type": "errors"},
    "a builtin": lambda p: p | {"type": "eval"},
    "an exception": lambda p: p | {"type": "DataError"},
    "no type": lambda p: {"fields": p["fields"]},
    "no fields": lambda p: {"type": p["type"]},
    "a field too few": lambda p: p | {"fields": {k: v for k, v in p["fields"].items()
                                               if k != "total"}},
    "a field too many": lambda p: _with(p, surprise=1),
    "no such tensor": lambda p: _with(p, values={"tensor": "t99"}),
    "too few labels": lambda p: _with(p, components=p["fields"]["components"][:-1]),
    "half a label": lambda p: _with(p, components=[{"component": ["head"]}]),
    "no such dtype": lambda p: _with(p, dtype={"dtype": "float1"}),
    "no JSON": lambda p: "{",
    "a number": lambda p: 3,
    "a list": lambda p: [p],
    "nothing": lambda p: None,
    "a deep nest": lambda p: "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_result_is_refused(folded, tmp_path, how):
    path = lf.attribute_logits(folded, CLEAN, 3).save(tmp_path / "one")
    assert same(lf.load_result(rewritten(path, lambda p: p)), lf.load_result(path))
    with pytest.raises(DataError, match="no result"):
        lf.load_result(rewritten(path, TAMPERED[how]))


def test_other_numbers_do_not_verify(folded, tmp_path):
    path = lf.attribute_logits(folded, CLEAN, 3).save(tmp_path / "one")
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 0x20  # a bit of the last tensor
    (tmp_path / "flipped").write_bytes(bytes(raw))
    with pytest.raises(InexactError):
        lf.load_result(tmp_path / "flipped").verify()


def test_foreign_files_are_refused(folded, tmp_path):
    path = lf.attribute_logits(folded, CLEAN, 3).save(tmp_path / "one")
    (tmp_path / "short").write_bytes(path.read_bytes()[:-8])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("a result")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "pickle").open("wb") as file:
        pickle.dump({"type": "Contributions"}, file)
    torch.save({"values": torch.ones(3)}, tmp_path / "torch")
    save_file({"t0": torch.ones(3)}, tmp_path / "tensors")
    save_file({"t0": torch.ones(3)}, tmp_path / "other", {"format": "pt"})
    for name in ("short", "empty", "text", "folder", "pickle", "torch", "tensors", "other", "none"):
        with pytest.raises(DataError, match="no result"):
            lf.load_result(tmp_path / name)


def test_clean_minus_corrupt_is_part_by_part(folded, live):
    for trace in (lambda t: lf.trace(folded, t), lambda t: lf.trace(live, t, hold=True)):
        clean, corrupt = (lf.attribute_logits(trace(t), 3, 5) for t in (CLEAN, CORRUPT))
        change = clean - corrupt
        for label in clean.labels:
            close(change[label], clean[label] - corrupt[label])
        close(change.total, clean.total - corrupt.total)
        close(change.values.sum(), change.total)
        assert change.held == clean.held
        assert change.gap == (clean.gap and max((clean.gap, corrupt.gap), key=lambda g: g.relative))
        assert change.certificate.holds
        assert "minus" in change.certificate.identity
        assert (
            change.top(3)["component"].iloc[0] == change.labels[int(change.values.abs().argmax())]
        )
        assert change.prompts == ()  # of two prompts
        assert (clean - lf.attribute_logits(trace(CLEAN), 7, 5)).prompts == clean.prompts
        two = lf.attribute_logits(trace(CLEAN), [3, 5]) - lf.attribute_logits(trace(CLEAN), [7, 9])
        one = lf.attribute_logits(trace(CLEAN), 3) - lf.attribute_logits(trace(CLEAN), 7)
        assert two.select(answer=0).of == one.of
        close(two.select(answer=0).values, one.values)
    nothing = clean - clean  # a difference of equal numbers is no error
    assert nothing.certificate.holds
    assert not nothing.values.any()


def test_a_difference_of_large_numbers_is_judged_by_them(folded):
    single = lf.attribute_logits(folded, CLEAN, 3)
    huge = replace(single, values=single.values * 1e6, total=single.total * 1e6)
    other = replace(huge, values=huge.values + 1e-6 / len(huge), total=huge.total + 1e-6)
    (huge - other).verify()
    wrong = replace(other, total=other.total + 1.0)
    with pytest.raises(InexactError):
        (huge - wrong).verify()


def test_what_does_not_match_is_not_subtracted(folded):
    one = lf.attribute_logits(folded, CLEAN, 3)
    for other in (
        lf.attribute_logits(folded, CLEAN, 3, by="neuron"),
        lf.attribute_logits(folded, BATCH, 3),
        lf.attribute_logits(folded, CLEAN, [3, 5]),
        lf.attribute_neuron(folded, CLEAN, 2, 7),
    ):
        with pytest.raises(DataError, match="cannot be subtracted"):
            _ = one - other
    with pytest.raises(TypeError):
        _ = one - 3


def test_what_has_another_unit_is_not_subtracted(folded):
    pre, post = (lf.attribute_neuron(folded, CLEAN, 2, 7, of=of) for of in ("pre", "post"))
    assert pre.labels == post.labels
    with pytest.raises(DataError, match="cannot be subtracted"):
        _ = pre - post


def test_the_mean_over_prompts_is_the_mean_of_each(folded, live):
    for trace in (lf.trace(folded, BATCH), lf.trace(live, BATCH, hold=True)):
        batch = lf.attribute_logits(trace, [3, 4, 5], 6)
        mean, each = batch.mean(), [batch.select(i) for i in range(3)]
        close(mean.values, sum(one.values for one in each) / 3)
        close(mean.total, sum(one.total for one in each) / 3)
        assert mean.dims == ()
        assert mean.certificate.holds
        assert mean.held == batch.held
        assert mean.gap == batch.gap
        assert mean.of == ("mean over 3 prompts",)
        assert len(mean.top(4)) == 4
    several = lf.attribute_logits(folded, BATCH, [[3, 4]] * 3)
    close(several.mean("answer").values, several.values.mean(2))
    close(several.mean().select(answer=1).values, several.values[..., 1].mean(1))
    assert several.mean("answer").of[0].startswith("mean of")
    text = lf.attribute_next_tokens(folded, BATCH)
    close(text.mean().mean("target").values, text.values.mean((1, 2)))
    with pytest.raises(DataError, match="no dimension 'key'"):
        text.mean("key")


def test_one_answer_of_a_mean_over_prompts_is_named(folded):
    several = lf.attribute_logits(folded, BATCH, [[3, 4]] * 3)
    assert several.mean().select(answer=1).of != ()


def test_every_dimension_is_selected_by_name(folded):
    trace = lf.trace(folded, BATCH)
    answers = lf.attribute_logits(trace, [[3, 4]] * 3)
    close(answers.select(prompt=2, answer=1).values, answers.values[:, 2, 1])
    close(answers.select(answer=-1).values, answers.values[:, :, 1])
    close(answers.select(1).select(0).values, answers.values[:, 1, 0])
    assert answers.select(prompt=2, answer=1).of == (answers.answers[2][1],)
    text = lf.attribute_next_tokens(trace)
    close(text.select(prompt=1, target=3).values, text.values[:, 1, 3])
    stream = lf.decompose_residual(trace, pos=slice(1, 4))
    close(stream.select(prompt=0, pos=2, d_model=7).values, stream.values[:, 0, 2, 7])
    scores = lf.attribute_scores(trace, 2, 1, keys=[4, 2])
    close(scores.by_query().select(prompt=1, key=4).values, scores.values[:, :, 1, 0].sum(1))
    close(scores.select(prompt=1, key=2).values, scores.values[:, :, 1, 1:])
    affine = lf.affine_map(trace, 3)
    close(affine.select(prompt=-1).jacobian, affine.jacobian[-1])
    graph = lf.flow_graph(trace, 3)
    close(graph.select(prompt=1).flow, graph.flow[:, 1])
    lens = lf.logit_lens(trace)
    close(lens.select(prompt=1).values, lens.values[:, [1]])
    close(lens.select(1).values, lens.values[:, [1]])
    for result, wrong in (
        (answers, {"target": 0}), (answers, {"prompt": 3}), (answers, {"answer": -3}),
        (scores, {"pos": 0}), (scores, {"key": 3}), (scores, {"prompt": 3}),
        (affine, {"prompt": 3}), (graph, {"prompt": 3}), (graph, {"pos": 0}), (lens, {"prompt": 3}),
    ):  # fmt: skip
        with pytest.raises(DataError):
            result.select(**wrong)


def test_a_key_is_one_kind_of_index_everywhere(folded):
    scores = lf.attribute_scores(folded, CLEAN, 2, 1, keys=[4, 2])
    close(scores.by_query().select(key=4).values, scores.select(key=4).values[..., 0].sum(1))


def test_a_key_is_named_by_its_position(folded):
    scores = lf.attribute_scores(folded, CLEAN, 2, 1, keys=[4, 2]).by_query()
    (what,) = scores.select(key=4).of
    assert what.endswith(", key 4")
    assert scores.select(key=4).keys == ()
    assert scores.mean("key").keys == ()
    other = lf.attribute_scores(folded, CLEAN, 2, 1, keys=[4, 3]).by_query()
    with pytest.raises(DataError, match=r"keys \[4, 2\] and \[4, 3\] cannot be subtracted"):
        scores - other


def dims_of(result):
    return getattr(getattr(result, "contributions", result), "dims", ())


@pytest.mark.parametrize("hold", [False, True], ids=["free", "held"])
def test_one_vocabulary(folded, live, hold):
    for name, result in every_result(live if hold else folded, hold).items():
        assert result.error is result.certificate.error or result.error == result.certificate.error
        assert result.held == result.certificate.held
        assert result.gap == result.certificate.gap
        assert bool(result.held) == (hold and name != "residual")
        assert type(result).__name__ in repr(result)
        if name == "additivity":
            continue
        while dims_of(result) and not (name.startswith("scores") and result.dims == ("key",)):
            result = result.select(**{dims_of(result)[0]: 1})
        frame = result.to_frame()
        assert len(frame) > 0
        top = result.top(1, k=2) if name.startswith("scores") else result.top(2)
        assert len(top) == 2
        with pytest.raises(DataError, match="at least 1"):
            result.top(*([1] if name.startswith("scores") else []), k=0)


def test_top_is_in_order_and_no_longer_than_there_are_rows(folded):
    for name, result in every_result(folded, False).items():
        if dims_of(result) or not hasattr(result, "top"):
            continue
        top = result.top(10_000)
        column = {"flow": "flow", "effects": "total", "pattern": "change", "flips": "distance"}
        values = top[column.get(name, "value")].abs()
        assert values.is_monotonic_increasing if name == "flips" else values.is_monotonic_decreasing
