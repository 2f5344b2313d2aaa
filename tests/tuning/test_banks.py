"""A bank of norms for each domain: what one is trained on changes no other, in any form."""

from dataclasses import replace

import pytest
import torch
from support.loaded import frozen_model, live_model

import lnfree_interp as lf
from lnfree_interp.errors import (
    DataError,
    NormSiteError,
    PausedError,
    RecipeError,
    TrainingError,
)
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.sites import stock_weights
from lnfree_interp.numerics import soft_cap


def text(n, seed, *tokens):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(tokens)[torch.randint(len(tokens), (n, 16), generator=generator)]


OF_A, OF_B = (7, 19), (160, 201)
A, B = text(8, 1, *OF_A), text(8, 2, *OF_B)
MIXED = torch.stack([A[0], B[0], B[1], A[1], B[2]])
RECIPE = replace(
    lf.recipes.finetuning(steps=3, batch=4), precision="float32", lr=3e-3, warmup=1,
    weight_decay=0.1, guard=lf.Guard(above_best=1e3, sigma_factor=1e6),
)  # fmt: skip


def partly_frozen(dtype=torch.float64):
    model = lf.with_norm_sites(live_model("gpt2", dtype))
    lf.freeze_site(model, "ln_final", 2.0, first=3.0)
    lf.freeze_site(model, "blocks.1.ln1.v", 1.5)
    return model


MODELS = {
    "LayerNorm, tied": lambda dtype=torch.float64: live_model("gpt2", dtype),
    "RMSNorm, grouped": lambda dtype=torch.float64: live_model("llama-grouped", dtype),
    "RMSNorm, norms on queries": lambda dtype=torch.float64: live_model("qwen3", dtype),
    "RMSNorm, after sublayers": lambda dtype=torch.float64: live_model("gemma2", dtype),
    "CRMSNorm": lambda dtype=torch.float64: lf.to_map(live_model("gpt2", dtype), "CRMSNorm").model,
    "curves": lambda dtype=torch.float64: lf.to_dyt(live_model("gpt2", dtype), tokens=A).model,
    "some frozen": partly_frozen,
    "frozen": lambda dtype=torch.float64: frozen_model("gpt2", dtype),
    "frozen, grouped": lambda dtype=torch.float64: frozen_model("llama-grouped", dtype),
}
EVERY = pytest.mark.parametrize("kind", list(MODELS))
FROZEN = pytest.mark.parametrize("kind", ["frozen", "frozen, grouped"])


def two_banks(model, keys=False):
    banks = lf.NormBanks.of(model)
    banks.train("a", A, RECIPE, progress=False)
    banks.train("b", B, RECIPE, progress=False)
    if keys:
        banks.fit_keys({"a": A, "b": B})
    return banks


def one_by_one(banks, domains):
    rows = zip(domains, MIXED[:, None], strict=True)
    return torch.cat([banks.model(domain)(row) for domain, row in rows])


def norm_names(model):
    return lf.select_parameters(model, "norms").chosen.keys()


@EVERY
def test_a_domain_is_bit_for_bit_what_it_was_when_another_is_trained(kind):
    banks = lf.NormBanks.of(MODELS[kind]())
    banks.train("a", A, RECIPE, progress=False)
    base, before = (banks.model(name)(MIXED) for name in ("base", "a"))
    banks.train("b", B, RECIPE, progress=False)
    assert banks.domains == ("a", "b")
    assert torch.equal(banks.model("a")(MIXED), before)
    assert torch.equal(banks.model("base")(MIXED), base)
    assert not torch.equal(banks.model("b")(MIXED), before)
    assert not torch.equal(before, base)


@EVERY
def test_a_bank_has_all_norms_and_nothing_else(kind):
    banks = two_banks(MODELS[kind]())
    base, other = stock_weights(banks.model("base")), stock_weights(banks.model("b"))
    changed = {name for name, W in other.items() if not torch.equal(W, base[name])}
    assert changed == norm_names(banks.model("base"))
    assert lf.live_sites(banks.model("b")) == lf.live_sites(banks.model("base"))


def test_the_model_that_was_given_does_not_change():
    model = MODELS["LayerNorm, tied"]()
    before = {name: W.clone() for name, W in model.named_parameters()}
    two_banks(model)
    assert all(torch.equal(W, before[name]) for name, W in model.named_parameters())
    assert all(W.requires_grad for W in model.parameters())


class TestStart:
    def test_a_fresh_bank_is_the_one_before_bit_for_bit(self):
        banks = two_banks(MODELS["LayerNorm, tied"]())
        fresh, before = stock_weights(banks.model()), stock_weights(banks.model("b"))
        assert all(torch.equal(W, before[name]) for name, W in fresh.items())
        assert torch.equal(banks.model()(MIXED), banks.model("b")(MIXED))
        unused = lf.NormBanks.of(MODELS["LayerNorm, tied"]())
        assert torch.equal(unused.model()(MIXED), unused.model("base")(MIXED))

    @pytest.mark.parametrize("start", [None, "a", "base"])
    def test_training_begins_there(self, start):
        banks = two_banks(MODELS["LayerNorm, tied"]())
        whole = replace(RECIPE, batch=len(A), micro_batch=len(A))
        run = banks.train("c", A, whole, start=start, progress=False)
        losses = {name: lf.evaluate_loss(banks.model(name), A).mean for name in ("b", "a", "base")}
        found = run.history[0].loss
        assert found == pytest.approx(losses.pop(start or "b"), rel=1e-6)
        assert all(abs(found - loss) > 1e-4 for loss in losses.values())

    def test_part_of_the_norms(self):
        banks = lf.NormBanks.of(MODELS["LayerNorm, tied"]())
        banks.train("a", A, replace(RECIPE, trainable="norms:ln2"), progress=False)
        base, a = stock_weights(banks.model("base")), stock_weights(banks.model("a"))
        changed = {name for name, W in a.items() if not torch.equal(W, base[name])}
        assert changed == {name for name in norm_names(banks.model("a")) if ".ln2." in name}


class TestMixedBatches:
    @EVERY
    def test_each_sequence_has_the_logits_of_its_own_bank(self, kind):
        banks = two_banks(MODELS[kind]())
        domains = ["a", "b", "b", "a", "base"]
        found = banks.logits(MIXED, domains)
        for domain in set(domains):
            rows = [i for i, one in enumerate(domains) if one == domain]
            assert torch.equal(found[rows], banks.model(domain)(MIXED[rows]))
        alone = torch.cat(
            [banks.model(d)(row[None]) for d, row in zip(domains, MIXED, strict=True)]
        )
        assert (found - alone).abs().max() < 1e-10
        swapped = banks.logits(MIXED, ["b", "a", "a", "b", "base"])
        assert (found[:4] - swapped[:4]).abs().amax((1, 2)).min() > 1e-3

    def test_in_float32(self):
        banks = two_banks(MODELS["LayerNorm, tied"](torch.float32))
        domains = ["a", "b", "b", "a", "base"]
        found = banks.logits(MIXED, domains)
        alone = torch.cat(
            [banks.model(d)(row[None]) for d, row in zip(domains, MIXED, strict=True)]
        )
        assert (found - alone).abs().max() < 1e-6 * alone.abs().max()

    def test_by_keys(self):
        banks = two_banks(MODELS["LayerNorm, tied"](), keys=True)
        expected = banks.logits(MIXED, ["a", "b", "b", "a", "b"])
        assert torch.equal(banks.logits(MIXED), expected)

    def test_a_domain_for_each(self):
        with pytest.raises(DataError, match="2 domains for 5 sequences"):
            two_banks(MODELS["LayerNorm, tied"]()).logits(MIXED, ["a", "b"])


class TestKeys:
    @EVERY
    @pytest.mark.parametrize("layer", [None, 0, 3])
    def test_planted_domains_are_recovered(self, kind, layer):
        banks = two_banks(MODELS[kind]())
        banks.fit_keys({"a": A, "b": B}, layer=layer)
        unseen = torch.cat([text(20, 5, *OF_A), text(20, 6, *OF_B)])
        assert banks.select(unseen) == ["a"] * 20 + ["b"] * 20

    def test_swapped_keys_are_all_wrong(self):
        banks = two_banks(MODELS["LayerNorm, tied"]())
        banks.fit_keys({"a": B, "b": A})
        assert banks.select(torch.cat([A, B])) == ["b"] * 8 + ["a"] * 8

    def test_a_sequence_is_selected_whatever_stands_beside_it(self):
        banks = two_banks(MODELS["LayerNorm, tied"](), keys=True)
        unsure = text(30, 9, *OF_A, *OF_B)
        together, alone = banks.select(unsure), [banks.select(row[None])[0] for row in unsure]
        assert together == alone
        assert {*together} == {"a", "b"}
        likeness = torch.cat([banks.similarity(row[None]) for row in unsure])
        assert (banks.similarity(unsure, batch=7) - likeness).abs().max() < 1e-12

    def test_a_similarity_is_the_cosine_with_the_mean_direction(self):
        banks = two_banks(MODELS["LayerNorm, tied"]())
        banks.fit_keys({"a": A, "b": B}, layer=1)
        _, cache = banks.model("base").run_with_cache(torch.cat([A, B, MIXED]))
        means = cache["blocks.1.hook_resid_pre"].mean(1)
        unit = means / means.norm(dim=-1, keepdim=True)
        keys = torch.stack([unit[:8].mean(0), unit[8:16].mean(0)])
        expected = unit[16:] @ (keys / keys.norm(dim=-1, keepdim=True)).T
        assert (banks.similarity(MIXED) - expected).abs().max() < 1e-12

    def test_a_key_is_added_and_others_stay(self):
        banks = two_banks(MODELS["LayerNorm, tied"]())
        banks.fit_keys({"a": A}, layer=1)
        with pytest.raises(DataError, match="no key is fitted for b"):
            banks.select(A)
        banks.fit_keys({"b": B})
        at_once = two_banks(MODELS["LayerNorm, tied"]())
        at_once.fit_keys({"b": B, "a": A}, layer=1)
        assert torch.equal(banks.similarity(MIXED), at_once.similarity(MIXED))
        with pytest.raises(DataError, match="the other keys are of layer 1"):
            banks.fit_keys({"a": A}, layer=2)
        with pytest.raises(DataError, match="give 0 to 3"):
            banks.fit_keys({"a": A, "b": B}, layer=4)
        banks.fit_keys({"a": A, "b": B}, layer=2)


class TestPatch:
    @FROZEN
    @pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
    def test_is_the_bank(self, kind, dtype, bar):
        banks = two_banks(MODELS[kind](dtype))
        whole = lf.fold(banks.model("b"))
        folded, patch = lf.fold(banks.model("base")), banks.patch("b")
        assert lf.compare_logits(folded, banks.model("b"), MIXED).relative > 1e-2
        places = dict(folded.named_parameters())
        with torch.no_grad():
            for name, W in patch.items():
                places[name] += W
        assert lf.compare_logits(folded, whole, MIXED).relative < bar
        # Folding rounds by itself: what a frozen model of float32 and its fold are apart.
        own = lf.compare_logits(whole, banks.model("b"), MIXED).relative
        assert lf.compare_logits(folded, banks.model("b"), MIXED).relative < bar + own
        with torch.no_grad():  # without one of its tensors it is another model
            places["unembed.W_U"] -= patch["unembed.W_U"]
        assert lf.compare_logits(folded, banks.model("b"), MIXED).relative > 1e-3

    def test_touches_readers_alone(self):
        patch = two_banks(MODELS["frozen"]()).patch("b")
        assert {name.rpartition(".")[2] for name in patch} == {
            "W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V", "W_in", "b_in", "W_U", "b_U",
        }  # fmt: skip

    def test_live_norms_have_none(self):
        with pytest.raises(NormSiteError, match="still live"):
            two_banks(MODELS["LayerNorm, tied"]()).patch("a")


UNSEEN = {"a": text(5, 11, *OF_A), "b": text(7, 12, *OF_B)}


class TestEvaluation:
    def test_with_the_banks_of_their_domains(self):
        banks = two_banks(MODELS["LayerNorm, tied"]())
        found = banks.evaluate(UNSEEN)
        loss = {
            (bank, domain): lf.evaluate_loss(banks.model(bank), tokens).mean
            for bank in ("base", "a", "b")
            for domain, tokens in UNSEEN.items()
        }
        expected = [[loss["a", "a"], loss["a", "b"]], [loss["a", "a"], loss["b", "b"]]]
        assert found.loss.tolist() == [pytest.approx(row, rel=1e-12) for row in expected]
        assert found.before.tolist() == pytest.approx([loss["base", "a"], loss["base", "b"]])
        for domain, tokens in UNSEEN.items():
            right = banks.model(domain)(tokens)[:, :-1].argmax(-1) == tokens[:, 1:]
            assert found.table("accuracy")[domain]["b"] == pytest.approx(right.double().mean())
        assert found.selected.tolist() == [[5, 0], [0, 7]]
        assert found.selection_accuracy == 1

    def test_by_keys(self):
        banks = two_banks(MODELS["LayerNorm, tied"](), keys=True)
        oracle, keys = banks.evaluate(UNSEEN), banks.evaluate(UNSEEN, selection="keys")
        assert torch.equal(oracle.loss, keys.loss)  # planted: all are right
        both = {"a": torch.cat([UNSEEN["a"], B[:3]]), "b": UNSEEN["b"]}
        found = banks.evaluate(both, selection="keys")
        assert found.selected.tolist() == [[5, 3], [0, 7]]
        assert found.selection_accuracy == pytest.approx(12 / 15)
        logits = banks.logits(both["a"])
        assert found.loss[1, 0].item() == pytest.approx(
            next_token_loss(logits, both["a"]).item(), rel=1e-12
        )
        first = lf.evaluate_loss(banks.model("a"), both["a"]).mean  # with no other to choose
        assert found.loss[0, 0].item() == pytest.approx(first, rel=1e-12)

    def test_with_the_last_bank_as_if_there_were_no_banks(self):
        banks = two_banks(MODELS["LayerNorm, tied"]())
        found = banks.evaluate(UNSEEN, selection="last")
        model = MODELS["LayerNorm, tied"]()
        for stage, tokens in enumerate((A, B)):  # one model, on one text after the other
            recipe = replace(RECIPE, trainable="norms")
            model = lf.finetune(model, recipe, tokens, progress=False).model
            losses = [lf.evaluate_loss(model, tokens).mean for tokens in UNSEEN.values()]
            assert found.loss[stage].tolist() == pytest.approx(losses, rel=1e-12)
        assert found.selected.tolist() == [[0, 5], [0, 7]]
        assert found.forgetting > banks.evaluate(UNSEEN).forgetting

    def test_forgetting_by_hand(self):
        accuracy = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.3], [0.6, 0.5, 0.7]]
        assert lf.forgetting(accuracy) == pytest.approx((0.3 + 0.3 + 0.0) / 3)
        losses = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
        assert lf.forgetting(losses, losses=True) == pytest.approx((2.0 + 0.0) / 2)
        result = lf.BankEvaluation(("x", "y"), ("x", "y"), "none", losses, losses / 10)
        assert result.forgetting == pytest.approx(1.0)
        assert result.forgotten_accuracy == pytest.approx((0.0 + 0.3) / 2)
        assert result.table().loc["y", "x"] == 3.0
        with pytest.raises(DataError, match="nothing was selected"):
            _ = result.selection_accuracy
        with pytest.raises(DataError, match="'loss' or 'accuracy'"):
            result.table("other")
        with pytest.raises(DataError, match="2 stages and 1 domains"):
            lf.BankEvaluation(("x",), ("x", "y"), "none", losses, losses)
        with pytest.raises(DataError, match="a table"):
            lf.forgetting([])

    def test_of_what_there_is_not(self):
        banks = two_banks(MODELS["LayerNorm, tied"]())
        with pytest.raises(DataError, match="no key is fitted for a, b"):
            banks.evaluate(UNSEEN, selection="keys")
        with pytest.raises(DataError, match="'oracle', 'keys' or 'last'"):
            banks.evaluate(UNSEEN, selection="best")
        with pytest.raises(DataError, match="there is no text"):
            banks.evaluate({})


class TestHead:
    @pytest.mark.parametrize(
        "kind", ["LayerNorm, tied", "RMSNorm, grouped", "RMSNorm, after sublayers"]
    )
    def test_the_unembedding_alone_is_trained_behind_the_selected_banks(self, kind):
        banks = two_banks(MODELS[kind](), keys=True)
        before = {name: banks.model(name) for name in ("base", "a", "b")}
        mixed = {"a": torch.cat([A[:5], B[5:6]]), "b": B[:4]}  # one of them is selected otherwise
        recipe = replace(RECIPE, steps=1, warmup=0, batch=10, micro_batch=3)
        losses = banks.train_head(mixed, recipe, progress=False)
        tokens = torch.cat(list(mixed.values()))
        streams = [
            before[domain].run_with_cache(row[None])[1]["ln_final.hook_normalized"]
            for row, domain in zip(tokens, ["a"] * 5 + ["b"] * 5, strict=True)
        ]
        gains = [before[d].ln_final for d in ["a"] * 5 + ["b"] * 5]
        x = torch.cat([
            y * norm.w + (0 if norm.b is None else norm.b)
            for y, norm in zip(streams, gains, strict=True)
        ]).detach()  # fmt: skip
        W = before["a"].W_U.detach().clone().requires_grad_()
        b = before["a"].b_U.detach()
        logits = soft_cap(x @ W + b, before["a"].cfg.output_logits_soft_cap)
        loss = next_token_loss(logits, tokens)
        assert losses == (pytest.approx(loss.item(), rel=1e-12),)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([W], recipe.clip)
        torch.optim.AdamW([W], lr=recipe.lr, betas=recipe.betas, weight_decay=0.1).step()
        assert (banks.model("a").W_U - W).abs().max() < 1e-10
        for name, old in before.items():
            assert torch.equal(banks.model(name).W_U, banks.model("a").W_U)
            kept, now = stock_weights(old), stock_weights(banks.model(name))
            assert {n for n in now if not torch.equal(now[n], kept[n])} == {"unembed.W_U"}
            assert not torch.equal(banks.model(name)(MIXED), old(MIXED))

    def test_more_banks_afterwards(self, tmp_path):
        banks = two_banks(MODELS["frozen"](), keys=True)
        losses = banks.train_head({"a": A, "b": B}, replace(RECIPE, steps=20), progress=False)
        assert sum(losses[-5:]) < sum(losses[:5])
        before = banks.model("a")(MIXED)
        banks.train("c", B, RECIPE, progress=False)
        assert torch.equal(banks.model("a")(MIXED), before)
        assert lf.compare_logits(lf.fold(banks.model("c")), banks.model("c")).relative < 1e-10

    def test_refuses(self):
        banks = two_banks(MODELS["LayerNorm, tied"]())
        with pytest.raises(DataError, match="no key is fitted"):
            banks.train_head({"a": A, "b": B}, RECIPE, progress=False)
        banks.fit_keys({"a": A, "b": B})
        with pytest.raises(RecipeError, match="has distillation"):
            banks.train_head({"a": A}, replace(RECIPE, distillation=0.5), progress=False)
        with pytest.raises(DataError, match="one length"):
            banks.train_head({"a": A, "b": B[:, :8]}, RECIPE, progress=False)
        broken = replace(RECIPE, lr=1e300, steps=3)
        with pytest.raises(TrainingError, match="give a lower lr"):
            banks.train_head({"a": A}, broken, progress=False)


def test_an_interrupted_run_goes_on(tmp_path):
    def banks():
        made = lf.NormBanks.of(MODELS["LayerNorm, tied"](torch.float32))
        made.train("a", A, RECIPE, progress=False)
        return made

    whole, other = banks(), banks()
    whole.train("b", B, RECIPE, progress=False)
    with pytest.raises(PausedError):
        other.train(
            "b", B, RECIPE, out=tmp_path / "run", minutes=1e-9, progress=False, copy_weights=False
        )
    assert other.domains == ("a",)
    assert all(W.requires_grad for W in other.model().parameters())
    more = {"out": tmp_path / "run", "resume": True, "progress": False}
    other.train("b", B, RECIPE, **more)
    assert torch.equal(other.model("b")(MIXED), whole.model("b")(MIXED))
    with pytest.raises(RecipeError, match="another model"):
        banks().train("c", B, RECIPE, start="base", **more)
