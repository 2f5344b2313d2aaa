"""Fine-tuning and removal in integers: reproducible, resumable, and by the formula."""

import functools
from dataclasses import replace

import pytest
import torch
from support.commands import lnfree
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.errors import PausedError, RecipeError, TrainingError, UnsupportedModelError
from lnfree_interp.models import integer_layers
from lnfree_interp.models.integer_mode import IntegerArithmetic
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.precision import integer_bits, products_dtype
from lnfree_interp.models.sites import stock_weights
from lnfree_interp.removal import chunked_loss
from lnfree_interp.removal.chunked_loss import LazyLogits
from lnfree_interp.removal.losses import Objective, distillation_loss
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import taper
from lnfree_interp.removal.settings import Guard, Special, Statistics
from lnfree_interp.removal.statistics import TokenGroups
from lnfree_interp.removal.training_state import fingerprint
from lnfree_interp.removal.trial import try_steps

TEXT = torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))
QUIET = {"progress": False, "log_every": 0}
LOOSE = Guard(above_best=1e9, sigma_factor=1e12)


@functools.cache
def model(kind="gpt2"):
    return live_model(kind, torch.float32)


def finetuning(**changes):
    settings = {"precision": "int8", "micro_batch": 2, "lr": 3e-3, "evaluate_every": 4}
    return replace(lf.recipes.finetuning(steps=8, batch=4), **settings | changes)


def history(run):
    return [replace(record, seconds=0.0) for record in run.history]


def require_same(one, other):
    assert history(one) == history(other)
    assert fingerprint(one.model) == fingerprint(other.model)


@pytest.fixture(scope="module")
def whole():
    return lf.finetune(model(), finetuning(), TEXT, heldout=TEXT[:4], **QUIET)


class TestRuns:
    def test_with_the_same_seed_are_the_same(self, whole):
        torch.manual_seed(123)  # not what is drawn by
        require_same(lf.finetune(model(), finetuning(), TEXT, heldout=TEXT[:4], **QUIET), whole)

    def test_that_are_interrupted_end_with_the_same_bits(self, whole, tmp_path):
        options = {"heldout": TEXT[:4], "out": tmp_path / "run", "checkpoint_every": 3} | QUIET
        with pytest.raises(PausedError):
            lf.finetune(model(), finetuning(), TEXT, minutes=0.0, **options)
        for step in range(2, 8):
            with pytest.raises(PausedError, match=f"step {step} of 8"):
                lf.finetune(model(), finetuning(), TEXT, minutes=0.0, resume=True, **options)
        require_same(lf.finetune(model(), finetuning(), TEXT, resume=True, **options), whole)

    def test_with_other_draws_are_others(self, whole, monkeypatch):
        """The text and its order being the same."""
        begin = integer_layers.Draws.begin
        monkeypatch.setattr(
            integer_layers.Draws, "begin", lambda self, key: begin(self, f"other {key}")
        )
        other = lf.finetune(model(), finetuning(), TEXT, heldout=TEXT[:4], **QUIET)
        assert other.history[0].loss == whole.history[0].loss  # forward, to the nearest
        assert other.history[0].gradient != whole.history[0].gradient
        assert other.history[0].gradient == pytest.approx(whole.history[0].gradient, rel=0.1)
        assert fingerprint(other.model) != fingerprint(whole.model)

    def test_draw_anew_in_each_micro_batch_and_step(self, monkeypatch):
        keys = []
        monkeypatch.setattr(
            integer_layers.Draws, "begin", lambda self, key: keys.append(key) or setattr(
                self, "_key", key) or setattr(self, "_count", 0)
        )  # fmt: skip
        lf.finetune(model(), finetuning(), TEXT, **QUIET)
        assert len(keys) == len(set(keys)) == 1 + 8 * 2

    def test_follow_those_in_floating_point(self):
        """Sixteen bits closely, eight less so."""
        runs = {
            precision: lf.finetune(model(), finetuning(precision=precision), TEXT, **QUIET)
            for precision in ("float32", "int16", "int12", "int8")
        }
        weights = {name: stock_weights(run.model) for name, run in runs.items()}
        before = stock_weights(lf.with_norm_sites(model()))

        def apart(name):
            ours, theirs = weights[name], weights["float32"]
            square = sum((ours[key] - W).pow(2).sum() for key, W in theirs.items())
            return (
                square / sum((before[key] - W).pow(2).sum() for key, W in theirs.items())
            ).sqrt()

        losses = {name: [record.loss for record in run.history] for name, run in runs.items()}
        assert losses["int16"] == pytest.approx(losses["float32"], rel=1e-3)
        assert apart("int16") < 0.05
        assert apart("int16") < apart("int12") < apart("int8")

    def test_train_what_they_are_told_to(self):
        words = ("norms:ln2", "L1H1", "30% of mlps")
        run = lf.finetune(model(), finetuning(trainable=words), TEXT, **QUIET)
        mask = lf.select_parameters(model(), *words)
        before, after = stock_weights(lf.with_norm_sites(model())), stock_weights(run.model)
        for name, W in before.items():
            chosen = mask.chosen.get(name, torch.zeros_like(W, dtype=torch.bool))
            changed = after[name] != W
            assert not (changed & ~chosen).any(), name
            assert name not in mask.chosen or changed.any()

    @pytest.mark.parametrize("kind", ["gpt2", "gemma2", "llama-grouped", "neox", "qwen3", "opt"])
    def test_remove_norms(self, kind):
        """Tapered, with special tokens, hooks inside the norms, and the original to learn from."""
        live = live_model(kind)
        recipe = Recipe(
            events=taper(live, start=1, over=4), steps=10, batch=2, micro_batch=1, lr=1e-5,
            warmup=2, final_lr=0.1, precision="int8", distillation=0.5, embedding_cap=0.9,
            special=Special(first_until=7, outliers_until=6), guard=LOOSE,
            statistics=Statistics(source="ema", tokens="ordinary", sequences=4),
        )  # fmt: skip
        run = lf.remove_norms(live, recipe, TEXT, progress=False, log_every=3)
        assert lf.live_sites(run.model) == ()
        free = lf.fold(run.model)
        assert not lf.integer_operations(free, TEXT[:1]).norms_divide
        control = lf.remove_norms(live, recipe.vanilla(), TEXT, **QUIET)
        assert lf.live_sites(control.model) == lf.list_norm_sites(control.model)
        exact = lf.remove_norms(live, replace(recipe, precision="float32"), TEXT, **QUIET)
        found, expected = (one.history[0].losses["cross_entropy"] for one in (run, exact))
        assert found == pytest.approx(expected, rel=0.05)
        assert found != expected

    def test_see_what_is_not_finite(self):
        """One activation of one token, which a width would otherwise hide."""

        def break_one(x, hook):
            x[0, 3, 5] = torch.inf
            return x

        with pytest.raises(TrainingError, match="diverged at step"):
            lf.finetune(
                model(), finetuning(), TEXT, fwd_hooks=[("blocks.1.mlp.hook_post", break_one)],
                **QUIET,
            )  # fmt: skip

    def test_are_timed_by_a_trial(self):
        trial = try_steps(live_model("gpt2", torch.float32), finetuning(), 24)
        assert trial.seconds > 0
        kept = {
            precision: try_steps(
                live_model("gpt2", torch.float32), finetuning(precision=precision), 24
            ).activations
            for precision in ("float32", "int8")
        }
        assert kept["int8"] < kept["float32"]


class TestLoss:
    @pytest.fixture(params=["gpt2", "gemma2"])  # in chunks; all logits at once
    def pair(self, request):
        return lf.with_norm_sites(live_model(request.param)), lf.with_norm_sites(
            live_model(request.param, seed=1)
        )

    def test_is_that_of_the_integer_model_and_the_exact_original(self, pair):
        student, teacher = pair
        tokens = TEXT[:3]
        objective = Objective(student, teacher, torch.float64, TokenGroups(0), bits=6)
        found = objective(tokens, {"distillation": 0.3})
        with lf.integer_arithmetic(student, 6):
            logits = student(tokens)
        ce, kl = next_token_loss(logits, tokens), distillation_loss(logits, teacher(tokens))
        assert found.terms["cross_entropy"].item() == pytest.approx(ce.item(), rel=1e-6)
        assert found.terms["distillation"].item() == pytest.approx(kl.item(), rel=1e-6)
        assert found.total.item() == pytest.approx(torch.lerp(ce, kl, 0.3).item(), rel=1e-6)
        exact = next_token_loss(student(tokens), tokens)
        assert abs(exact.item() - ce.item()) > 1e-4

    @pytest.mark.parametrize("bits", [8, 12])
    @pytest.mark.parametrize("rows", [7, 1000])
    def test_has_the_gradient_of_its_formula(self, bits, rows, monkeypatch):
        monkeypatch.setattr(chunked_loss, "_rows", lambda device, d_vocab: rows)
        drawn, rounded_gradient = [], chunked_loss.rounded_gradient
        monkeypatch.setattr(
            chunked_loss, "rounded_gradient",
            lambda *of: drawn.append((of[0].clone(), rounded_gradient(*of))) or drawn[-1][1],
        )  # fmt: skip
        draw = torch.Generator().manual_seed(0)
        h, W, b = (
            torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_()
            for shape in [(50, 8), (30, 8), (30,)]
        )
        targets = torch.randint(30, (50,), generator=draw)
        integers = IntegerArithmetic(lf.with_norm_sites(model()), bits)
        total, ce, _ = chunked_loss.logits_loss(
            LazyLogits(h, W, b), targets, dtype=torch.float64, integers=integers
        )
        (3 * total).backward()
        q, p = (lf.fixed_point(x, bits).value for x in (h, W))
        logits = q @ p.T + b.detach()
        dy = logits.softmax(-1) - torch.nn.functional.one_hot(targets, 30)
        s = torch.cat([rounded.value for _, rounded in drawn])
        torch.testing.assert_close(torch.cat([given for given, _ in drawn]), dy)
        assert len(drawn) == -(-50 // rows)
        assert 0 < (s - dy).abs().max() < max(2.0**r.exponent for _, r in drawn)
        expected = torch.nn.functional.cross_entropy(logits, targets)
        assert ce.item() == pytest.approx(expected.item(), rel=1e-13)
        for x, gradient in ((h, s @ p), (W, s.T @ q), (b, s.sum(0))):
            torch.testing.assert_close(x.grad, 3 * gradient / 50, rtol=1e-12, atol=1e-14)


class TestRefusals:
    def test_of_a_width_that_is_none(self):
        """Set afterwards: the tests' own type checks refuse it before."""
        wrong = finetuning()
        object.__setattr__(wrong, "precision", "int7")
        with pytest.raises(RecipeError, match=r"'int7'; choices: .*'int16', 'int12', 'int10', 'i"):
            wrong.__post_init__()

    def test_on_the_command_line(self, monkeypatch, capsys):
        with pytest.raises(SystemExit) as stopped:
            lnfree(monkeypatch, "remove", "--precision", "int7", "--plan")
        assert stopped.value.code == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert "invalid choice 'int7' for argument '--precision'" in shown
        assert "'int10'" in shown

    def test_of_attention_head_by_head(self):
        by_head = live_model("gpt2", torch.float32)
        by_head.set_use_attn_result(True)
        with pytest.raises(UnsupportedModelError, match="use_attn_result"):
            lf.finetune(by_head, finetuning(), TEXT, **QUIET)


def test_weights_stay_in_floating_point():
    assert [integer_bits(p) for p in ("auto", "bfloat16", "float32", "int8", "int16")] == [
        None, None, None, 8, 16,
    ]  # fmt: skip
    assert products_dtype("int8", torch.float32, torch.device("cpu")) == torch.float32
