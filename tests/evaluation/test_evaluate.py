"""Evaluation, figure by figure, against the plainest way to compute it."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.commands import lnfree
from support.loaded import live_model
from support.models import freeze_all, make_gpt2, make_tokenizer
from transformer_lens import HookedTransformer, patching
from transformer_lens.utilities import get_act_name

import lnfree_interp as lf
from lnfree_interp.data import named
from lnfree_interp.data.named import spread
from lnfree_interp.errors import DataError
from lnfree_interp.evaluation import evaluate
from lnfree_interp.evaluation.confidence_neurons import confidence_scores
from lnfree_interp.evaluation.job import EvaluationJob
from lnfree_interp.evaluation.loss import CrossEntropy
from lnfree_interp.evaluation.patching import corrupted_pairs, patch_residual
from lnfree_interp.evaluation.results import _shown
from lnfree_interp.evaluation.run_job import require_same_tokenizer, run_job
from lnfree_interp.evaluation.summaries import (
    calibration_error,
    distribution,
    residual_norms,
    sinks,
)
from lnfree_interp.evaluation.text_pass import measure_text


@pytest.fixture
def dtype():
    return torch.float64


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(
        *(torch.as_tensor(x, dtype=torch.float64) for x in (found, expected)),
        rtol=tolerance, atol=tolerance,
    )  # fmt: skip


def test_every_token_by_brute_force(live, folded, tokens):
    found = measure_text({"live": live, "free": folded}, tokens, "live")
    p_live = live(tokens)[:, :-1].softmax(-1)
    for name, model in (("live", live), ("free", folded)):
        logits, cache = model.run_with_cache(tokens)
        p = logits[:, :-1].softmax(-1)
        measures = found[name]
        close(measures.loss, -p.gather(-1, tokens[:, 1:, None])[..., 0].log())
        close(measures.entropy, -(p * p.log()).sum(-1))
        close(measures.confidence, p.max(-1).values)
        assert torch.equal(measures.correct, p.argmax(-1) == tokens[:, 1:])
        m = (p + p_live) / 2
        jsd = ((p * (p / m).log()).sum(-1) + (p_live * (p_live / m).log()).sum(-1)) / 2
        close(measures.divergence, jsd)
        kl = (p_live * (p_live / p).log()).sum(-1)
        about = distribution(measures)
        assert about.kl == pytest.approx(kl.mean().item(), rel=1e-10, abs=1e-12)
        assert about.kl_median == pytest.approx(
            np.median(kl.detach().numpy()), rel=1e-10, abs=1e-12
        )
        same = (p.argmax(-1) == p_live.argmax(-1)).double().mean().item()
        assert about.agreement == pytest.approx(same)

        streams = [cache[get_act_name("resid_pre", layer)] for layer in range(3)]
        streams.append(cache[get_act_name("resid_post", 2)])
        norms = torch.stack([stream.norm(dim=-1) for stream in streams])
        close(measures.norms, norms)
        summary = residual_norms(measures)
        close(summary.first_max, norms[:, :, 0].amax(1))
        close(summary.others_median, norms[:, :, 1:].flatten(1).quantile(0.5, dim=1))
        assert (summary.others_max >= summary.others_median).all()

        patterns = torch.stack([cache["pattern", layer][..., 0] for layer in range(3)], 1)
        close(sinks(measures).query_rate, (patterns > 0.3).double().mean())
        close(sinks(measures).head_rate, (patterns.mean(-1) > 0.3).double().mean())
        close(sinks(measures).by_head, patterns.mean((0, -1)))
    assert distribution(found["live"]).divergence == pytest.approx(0, abs=1e-6)
    assert 0 < distribution(found["free"]).divergence < math.log(2)


def test_long_rows_have_one_first_token(tokenizer):
    """Their logits are computed in pieces, and a frozen norm may have a constant for the first."""
    model = lf.with_norm_sites(
        lf.load(make_gpt2(n_positions=300), tokenizer=tokenizer, dtype=torch.float64, check=False)
    )
    lf.freeze_site(model, "ln_final", 2.0, first=20.0)
    tokens = torch.randint(300, (2, 300), generator=torch.Generator().manual_seed(3))
    loss = measure_text({"frozen": model}, tokens)["frozen"].loss
    close(loss, model(tokens, return_type="loss", loss_per_token=True))


def test_one_token_that_overflows_does_not_hide_the_others(live, folded, tokens):
    measures = measure_text({"live": live, "free": folded}, tokens, "live")["free"]
    kl, norms = measures.kl.clone(), measures.norms.clone()
    kl[0, 1] = norms[:, 0, 2] = math.nan
    broken = replace(measures, kl=kl, norms=norms)
    assert distribution(broken).kl_median >= distribution(measures).kl_median
    assert math.isfinite(distribution(broken).kl_median)
    assert residual_norms(broken).others_median.isfinite().all()
    assert (residual_norms(broken).others_max == math.inf).all()


def test_a_model_that_allows_no_neurons_is_evaluated_beside_one_that_does(live, tokens):
    models = {"live": live, "sub": lf.to_sub_ln(live).model}
    for original in models:
        found = lf.evaluate(models, tokens, original=original, pairs=0, effects=False)
        assert found.models["live"].confidence_neurons is not None
        assert found.models["sub"].confidence_neurons is None


def test_batches_change_nothing(live, folded, tokens):
    models = {"live": live, "free": folded}
    whole, parts = (
        lf.evaluate(models, tokens, original="live", batch=batch, pairs=4) for batch in (3, 1)
    )
    np.testing.assert_allclose(whole.to_frame(), parts.to_frame(), rtol=1e-6, atol=1e-9)
    assert whole.to_frame().loc["minus original"].isna()["live"]


def test_cross_entropy_statistics():
    losses = torch.rand(20, 100, generator=torch.Generator().manual_seed(0)).double() ** 8 * 30
    loss, flat = lf.CrossEntropy(losses), sorted(losses.flatten().tolist())
    assert loss.mean == pytest.approx(sum(flat) / 2000)
    assert loss.median == pytest.approx((flat[999] + flat[1000]) / 2)
    assert loss.p99_9 == pytest.approx(np.percentile(flat, 99.9))
    assert loss.maximum == flat[-1]
    assert loss.trimmed_mean == pytest.approx(sum(flat[20:-20]) / 1960)
    close(loss.by_position, losses.mean(0))
    worse = lf.CrossEntropy(losses + 5 * (torch.arange(2000).view(20, 100) % 10 == 0))
    assert worse.share_above(loss) == pytest.approx(0.1)
    assert worse.share_above(loss, threshold=5.5) == 0
    with pytest.raises(DataError, match="two texts"):
        loss.share_above(lf.CrossEntropy(losses[:3]))


def test_calibration_error_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(5, 200, generator=generator)
    correct = torch.rand(5, 200, generator=generator) < confidence**2
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = correct[inside].double().mean() - confidence[inside].double().mean()
            error += inside.double().mean().item() * gap.abs().item()
    assert calibration_error(confidence, correct) == pytest.approx(error, rel=1e-6)
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0


def test_confidence_neurons(live, folded, tokens):
    last = live.cfg.n_layers - 1
    with torch.no_grad():  # one that writes where nothing is read, and one that is read strongly
        W_out, W_U = folded.blocks[last].mlp.W_out, folded.W_U
        unread = torch.linalg.svd(W_U)[0][:, -1]
        W_out[7] = 50 * unread
    scores = confidence_scores(folded)
    cosines = torch.cosine_similarity(W_out[:, :, None].float(), W_U[None].float(), dim=1)
    others = [i for i in range(len(scores)) if i != 7]
    close(scores[others], (W_out.norm(dim=1) / cosines.var(dim=1))[others], 1e-4)
    assert lf.find_confidence_neurons(folded, 1) == [7]
    for model in (live, folded):
        ablation = lf.ablate_neurons(model, tokens, [7, 3], batch=2)
        mean = model.run_with_cache(tokens)[1]["post", last].mean((0, 1))

        def to_mean(post, hook, mean=mean):
            post[..., [7, 3]] = mean[[7, 3]]
            return post

        with model.hooks([(f"blocks.{last}.mlp.hook_post", to_mean)]):
            p = model(tokens)[:, :-1].softmax(-1)
        before = model(tokens)[:, :-1].softmax(-1)
        change = (p.gather(-1, tokens[:, 1:, None]) / before.gather(-1, tokens[:, 1:, None])).log()
        close(ablation.loss_change[-1], -change[..., 0], 1e-4)
        entropies = [-(x * x.log()).sum(-1) for x in (p, before)]
        close(ablation.entropy_change[-1], entropies[0] - entropies[1], 1e-4)
        assert ablation.loss_change.shape == (3, 3, 19)
    with pytest.raises(DataError, match="neurons 0 to 127"):
        lf.ablate_neurons(folded, tokens, [200])


def test_patching_against_transformer_lens(live, folded):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(300, (6, 20), generator=generator)
    clean, corrupted, targets = corrupted_pairs(text, n=3, length=9, seed=1)
    assert ((clean != corrupted).sum(1) == 1).all()
    rows = text.unfold(1, 10, 1).flatten(0, 1).tolist()
    assert all(
        [*row, target] in rows for row, target in zip(clean.tolist(), targets.tolist(), strict=True)
    )
    for model in (live, folded):
        found = patch_residual(model, clean, corrupted, targets)
        in_two = patch_residual(model, clean, corrupted, targets, batch=2)
        for name in ("measured", "estimated", "total"):
            close(getattr(in_two, name), getattr(found, name), 1e-9)
        for i in range(3):
            _, cache = model.run_with_cache(clean[i : i + 1])
            base = model(corrupted[i : i + 1])[0, -1, targets[i]]
            measured = patching.get_act_patch_resid_pre(
                model, corrupted[i : i + 1], cache, lambda logits, i=i: logits[0, -1, targets[i]]
            )
            close(found.measured[:, :, i], measured - base, 1e-5)
        close(found.measured[0].sum(0), found.total, 1e-5)  # the one token that differs
        # A small step along the estimate's direction does what the gradient says.
        _, there = model.run_with_cache(clean)
        _, here = model.run_with_cache(corrupted)
        stream, step = here["resid_pre", 1].clone(), 1e-5
        stream[:, 4] += step * (there["resid_pre", 1] - here["resid_pre", 1])[:, 4]
        rows = torch.arange(3)
        moved = model(stream, start_at_layer=1)[rows, -1, targets]
        base = model(corrupted)[rows, -1, targets]
        close((moved - base) / step, found.estimated[1, 4], 1e-3)
        assert found.error_by_layer.shape == (3,)
        assert not any(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(DataError, match="do not fit"):
        corrupted_pairs(text, length=20)
    with pytest.raises(DataError, match="batch=0"):
        patch_residual(folded, clean, corrupted, targets, batch=0)


def test_what_is_short_comes_before_the_text(folded, tokens, monkeypatch):
    """So that a failure does not lose an hour's pass over the text."""

    def fails(*args, **more):
        raise RuntimeError("out of memory")

    for name in ("_effects", "ablate_neurons", "patch_residual", "loss_without_blocks"):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, name, fails)
            patch.setattr(evaluate, "measure_text", lambda *args, **more: pytest.fail("too late"))
            with pytest.raises(RuntimeError, match="out of memory"):
                lf.evaluate({"free": folded}, tokens, neurons=1)


def test_attribution_is_exact_without_norms_only(live, folded, tokens):
    frame = lf.evaluate({"live": live, "free": folded}, tokens, pairs=0, neurons=0).to_frame()
    assert frame.loc["attribution error per head (NMAE)", "free"] < 1e-9
    assert frame.loc["attribution error per head (NMAE)", "live"] > 0.01
    assert "minus original" not in frame.index
    assert "attribution patching error" not in frame.index


def test_json_and_table_say_the_same(live, folded, tokens):
    evaluation = lf.evaluate(
        {"live": live, "free": folded}, tokens, original="live", pairs=2, text="random"
    )
    plain = json.loads(evaluation.to_json())
    frame = evaluation.to_frame()
    for name in ("live", "free"):
        figures = plain["models"][name]["figures"]
        assert figures == {k: v for k, v in frame[name].items() if not math.isnan(v)}
    text = evaluation.table().to_text()
    assert f"{frame.loc['cross-entropy, mean', 'free']:.4f}" in text
    assert "random, 57 tokens" in text
    assert "free" in repr(evaluation)


def test_wrong_evaluations_are_refused(live, folded, tokens):
    for question, message in (
        (lambda: lf.evaluate({}, tokens), "given by name"),
        (lambda: lf.evaluate(live, tokens, pairs=-2), "cannot be negative"),
        (lambda: lf.evaluate(live, tokens, threshold=math.nan), "cannot be negative"),
        (lambda: lf.evaluate({"a": live}, tokens, original="b"), "no model is called 'b'"),
        (lambda: lf.evaluate(live, tokens + 300), "tokenized for another model"),
        (lambda: lf.evaluate(live, tokens, batch=0), "at least one sequence"),
        (lambda: lf.evaluate(live, tokens, neurons=999), "128 neurons, not 999"),
    ):
        with pytest.raises(DataError, match=message):
            question()


def test_named_texts(tokenizer, monkeypatch):
    opened = []

    def fake(source, **settings):
        opened.append((source, settings))
        if "pile" in source:
            rows = [{"input_ids": list(range(i, i + 64))} for i in range(5)]
            return Dataset.from_list(rows)
        return Dataset.from_list([{"text": f"for i in range({i}):\n"} for i in range(4000)])

    monkeypatch.setattr(named, "open_text", fake)
    pile = lf.evaluation_text("pile-10k", None, 64)
    assert pile.shape == (5, 64)
    assert opened[0] == ("apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2", {})
    assert lf.evaluation_text("pile-10k-filtered", None, 32, 2).shape == (2, 32)
    assert opened[1][0] == "lucabaroni/apollo-pile-filtered-10k"
    with pytest.raises(DataError, match="tokenized for GPT-2"):
        lf.evaluation_text("pile-10k", tokenizer, 64)
    with pytest.raises(DataError, match="have 64 tokens, fewer than sequence_length 128"):
        lf.evaluation_text("pile-10k", None, 128)
    owt = lf.evaluation_text("openwebtext-val", tokenizer, 8)
    documents = fake("openwebtext")
    expected = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]
    assert len(expected) == 2
    assert torch.equal(owt, lf.pack(expected, tokenizer, 8))
    with pytest.raises(DataError, match="sequences of 8 tokens, fewer than 99"):
        lf.evaluation_text("openwebtext-val", tokenizer, 8, 99)


def test_no_text_is_read_twice(tokenizer, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("for i in range(10):\n    print(i)\n" * 8)
    whole = lf.pack([{"text": file.read_text()}], tokenizer, 8)
    found = lf.evaluation_text(file, tokenizer, 8)
    assert torch.equal(found, whole)
    assert torch.equal(lf.evaluation_text(file, tokenizer, 8, 3), whole[:3])
    with pytest.raises(DataError, match=f"has {len(whole)} sequences of 8 tokens, fewer than 64"):
        lf.evaluation_text(file, tokenizer, 8, 64)
    with pytest.raises(DataError, match="too few for one sequence"):
        lf.evaluation_text(file, tokenizer, 4096)
    for source, wrong, message in (
        (file, {"name": "en"}, "is local"),
        ("stdlib", {"revision": "main"}, "is local"),
        ("stdlib", {"column": "nope"}, "no column 'nope'"),
        ("pile-10k", {"split": "test"}, "is a fixed text"),
        ("", {}, "name of the text is empty"),
    ):
        with pytest.raises(DataError, match=message):
            lf.evaluation_text(source, tokenizer, 8, **wrong)


def test_what_is_no_number_is_counted_not_hidden(live, folded, tokens):
    broken = lf.fold(freeze_all(live))
    with torch.no_grad():
        broken.b_U[7] = float("nan")
    evaluation = lf.evaluate(
        {"live": live, "broken": broken}, tokens, original="live", pairs=0, neurons=0, effects=False
    )
    frame = evaluation.to_frame()
    assert frame.loc["tokens without a finite loss"].tolist() == [0, 1]
    assert frame.loc["tokens worse by more than 3.5", "broken"] == 1
    assert math.isnan(frame.loc["cross-entropy, mean", "broken"])
    assert "nan" in evaluation.table().to_text()
    plain = json.loads(evaluation.to_json())
    assert plain["models"]["broken"]["figures"]["cross-entropy, mean"] is None


def test_bfloat16_products_leave_logits_alone(folded, tokens):
    model = live_model("gpt2", torch.float32)
    with torch.no_grad():
        model.unembed.b_U += 100
    exact = measure_text({"m": model}, tokens)["m"].loss
    rounded = measure_text({"m": model}, tokens, precision="bfloat16")["m"].loss
    assert 0 < (exact - rounded).abs().mean() < 0.02


def test_models_that_cannot_be_compared_are_not(live, tokenizer):
    other = lf.load(make_gpt2(), tokenizer=make_tokenizer(290), check=False)
    with pytest.raises(DataError, match="different tokenizers"):
        require_same_tokenizer({"a": live, "b": other})
    require_same_tokenizer({"a": live, "b": live})


def test_what_a_model_has_not_is_left_out(tokens):
    cfg = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "n_ctx": 24, "d_vocab": 300}
    model = HookedTransformer(cfg | {"attn_only": True, "normalization_type": None, "seed": 0})
    frame = lf.evaluate({"a": model, "b": model}, tokens, original="a", pairs=2).to_frame()
    assert not any("neurons" in label for label in frame.index)
    gemma = live_model("gemma2-no-caps", torch.float32)
    text = torch.randint(gemma.cfg.d_vocab, (2, 12), generator=torch.Generator().manual_seed(0))
    found = lf.evaluate(gemma, text, pairs=2)
    assert found.models["model"].direct_effects is None
    assert "attribution error per head (NMAE)" not in found.to_frame().index
    against = lf.evaluate({"a": gemma, "b": gemma}, text, original="a", pairs=2)
    assert against.models["b"].confidence_neurons is None
    one = lf.evaluate(model, torch.full((3, 10), 5), neurons=0, effects=False)
    assert one.models["model"].patching is None
    two = lf.evaluate(model, tokens[:, :2], neurons=0, effects=False)
    assert two.models["model"].patching is None


def test_blocks_are_spread_over_the_whole_text():
    tokens = torch.arange(10)[:, None]
    for n, expected in ((3, [0, 3, 6]), (6, [0, 1, 3, 5, 6, 8]), (10, [*range(10)])):
        assert spread(tokens, n)[:, 0].tolist() == expected
    assert len(spread(tokens, 99)) == 10


def test_losses_that_are_infinite_sort_last():
    loss = torch.arange(1000.0, dtype=torch.float64).view(10, 100)
    loss[3, 4], loss[5, 6] = math.inf, math.nan
    found = CrossEntropy(loss)
    assert found.median == pytest.approx(500, abs=2)
    assert found.p99_9 == math.inf
    assert math.isfinite(found.trimmed_mean)
    assert found.share_not_finite == 0.002


def test_a_weak_head_has_an_attribution_error_too(gpt2_folder, tokens):
    """In float32, its effect is far below the rounding of a logit."""
    free = lf.fold(freeze_all(lf.load(gpt2_folder, dtype=torch.float32)))
    with torch.no_grad():
        free.blocks[0].attn.W_O[0] *= 1e-9
    assert lf.direct_effects(free, tokens).nmae < 1e-5


def test_packed_text_may_have_empty_documents(folded):
    stream = torch.tensor([5, 6, 0, 0, 0, 7, 8, 9, 3, 4, 5, 6])
    lf.evaluate(folded, stream.view(3, 4), pairs=0, neurons=0)


def test_a_dead_neuron_is_no_confidence_neuron(folded, tokens):
    with torch.no_grad():
        folded.blocks[-1].mlp.W_out[5] = 0
    assert 5 not in lf.find_confidence_neurons(folded, 20)


def test_digits():
    assert _shown("hellaswag, acc_norm", 0.28567) == "0.2857"
    assert _shown("largest residual norm, others", 45.67) == "45.7"
    assert _shown("sink rate, by query", 0.018) == "1.8 %"
    assert _shown("moderate_task, acc", 0.5) == "0.5000"


def test_the_filter():
    pile = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 1, 7], [2, 3, 3]])
    reference = torch.tensor([[1, 2, 3], [4, 9, 3]])
    unwanted = lf.tokens_seen(pile.split(2), 10) & ~lf.tokens_seen([reference], 10)
    assert unwanted.nonzero()[:, 0].tolist() == [5, 6, 7]
    assert lf.without_tokens(pile, unwanted).tolist() == [[1, 2, 3], [2, 3, 3]]
    with pytest.raises(DataError, match="up to 7"):
        lf.tokens_seen([pile], 7)


def test_the_command(gpt2_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "free"
    lf.export(freeze_all(lf.load(gpt2_folder)), folder)
    arguments = ["evaluate", str(folder), "--original", str(gpt2_folder), "--data", "stdlib"]
    arguments += ["--sequences", "6", "--pairs", "2"]

    def run(*more):
        capsys.readouterr()
        lnfree(monkeypatch, *arguments, *more)
        return capsys.readouterr()

    out = tmp_path / "evaluation.json"
    assert "cross-entropy, mean" in run("--out", out).out
    plain = json.loads(out.read_text())
    assert list(plain["models"]) == [gpt2_folder.name, "free"]
    assert plain["tokens"] == 6 * 47
    (folder / "tokenizer.json").unlink()
    arguments += ["--no-effects", "--neurons", "0"]
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    assert "no tokenizer" in capsys.readouterr().err
    arguments += ["--tokenizer", str(gpt2_folder)]
    run()
    with pytest.raises(SystemExit) as stopped:
        run("--out", out)
    assert stopped.value.code == 2
    assert "already exists" in capsys.readouterr().err
    pipe = subprocess.Popen(
        [sys.executable, "-m", "lnfree_interp", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    pipe.stdout.close()  # as `| head` does
    assert "Traceback" not in pipe.communicate()[1]
    assert pipe.returncode == 141


def test_only_the_bundled_model_has_a_text_by_default(gpt2_folder):
    with pytest.raises(DataError, match=r"no text was named for .*give --data.*; pile-10k; .*stdl"):
        run_job(EvaluationJob(models=(str(gpt2_folder),)))
    bundled = str(lf.bundled_checkpoint())
    with pytest.raises(DataError, match=f"no text was named for {gpt2_folder}"):
        run_job(EvaluationJob(models=(bundled,), original=str(gpt2_folder)))
    quick = {"sequences": 2, "effects": False, "neurons": 0, "pairs": 0}
    for models, data in (((bundled,), None), ((str(gpt2_folder),), "stdlib")):
        evaluation = run_job(EvaluationJob(models=models, data=data, **quick), progress=False)
        assert evaluation.text == "stdlib"


def test_prompts_about_an_indirect_object():
    words = ["John", "Mary", "Tom", "James", "store", "market", "milk", "eggs", "bread"]
    words += [f" {word}" for word in words]
    tokenizer = make_tokenizer(300)
    tokenizer.add_tokens(words)
    gpt2 = lf.load(make_gpt2(vocab_size=len(tokenizer)), tokenizer=tokenizer, check=False)
    clean, corrupted, targets, foils = lf.ioi_pairs(gpt2, n=12, seed=3, prepend_bos=False)
    assert clean.shape == corrupted.shape
    assert len(clean) == len(targets) == len(foils) == 12
    for row, other, right, wrong in zip(clean, corrupted, targets, foils, strict=True):
        assert (row != other).sum() == 3  # each name where it stood, and one of them again
        assert {int(right), int(wrong)} <= {*row.tolist(), *other.tolist()}
        text = tokenizer.decode(row) + tokenizer.decode(right)
        name = tokenizer.decode(right).strip()
        assert text.count(name) == 2
        assert text.replace(name, "").count(tokenizer.decode(wrong).strip()) == 2
        swapped = tokenizer.decode(other)
        assert swapped.count(name) == 2
    assert torch.equal(clean, lf.ioi_pairs(gpt2, n=12, seed=3, prepend_bos=False)[0])
    assert lf.patch_residual(gpt2, clean, corrupted, targets, foils).total.shape == (12,)
    found = lf.evaluate(
        gpt2, torch.arange(24)[None], pairs=8, pairs_of="ioi", neurons=0, effects=False
    )
    patching = found.models["model"].patching
    assert patching.measured.shape[2] == 8
    assert 0 < patching.standard_error < 10 * patching.error


def test_ids_and_text_have_one_policy_for_bos(capsys):
    """Prompts by `ioi_pairs` are what the same text would be: BOS as the model adds it."""
    words = ["John", "Mary", "Tom"]
    tokenizer = make_tokenizer(300)
    tokenizer.add_tokens([*words, *(f" {word}" for word in words)])
    gpt2 = lf.load(make_gpt2(vocab_size=len(tokenizer)), tokenizer=tokenizer, check=False)
    for prepends in (True, False):
        gpt2.cfg.default_prepend_bos = prepends
        clean, _, targets, foils = lf.ioi_pairs(gpt2, n=2)
        assert (int(clean[0, 0]) == tokenizer.bos_token_id) == prepends
        text = tokenizer.decode(clean[0], skip_special_tokens=True)
        by_text = lf.attribute_logits(gpt2_free(gpt2), text, int(targets[0]), int(foils[0]))
        by_ids = lf.attribute_logits(gpt2_free(gpt2), clean[0], int(targets[0]), int(foils[0]))
        torch.testing.assert_close(by_text.values, by_ids.values)
    with pytest.raises(DataError, match="models of English"):
        lf.ioi_pairs(lf.load(make_gpt2(), tokenizer=make_tokenizer(300), check=False))


def gpt2_free(model):
    sited = lf.with_norm_sites(model)
    for site in lf.list_norm_sites(sited):
        lf.freeze_site(sited, site, 1.0)
    free = lf.fold(sited)
    free.cfg.default_prepend_bos = model.cfg.default_prepend_bos
    return free
