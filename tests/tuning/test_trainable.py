"""Only what a recipe names is trained; every other parameter is bit for bit what it was."""

import json
from dataclasses import replace

import pytest
import torch
from support.architectures import ALL
from support.loaded import live_model
from torch import nn

import lnfree_interp as lf
from lnfree_interp.data.sequences import ShuffledSequences
from lnfree_interp.errors import PausedError, RecipeError
from lnfree_interp.models.sites import stock_weights
from lnfree_interp.removal.optimizer import PartialAdamW, adamw
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.tuning.selection import parameters_of

TEXT = torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))
WORDS = ("norms:ln2", "L1H1", "30% of mlps")


@pytest.fixture(scope="module")
def model():
    return live_model("gpt2", torch.float32, n_layer=2)


def a_recipe(model, **changes):
    settings = {
        "steps": 50, "batch": 2, "precision": "float32", "evaluate_every": 25, "trainable": WORDS,
        "weight_decay": 0.3, "lr": 3e-3, "weight_average": 0.8, "seed": 7,
    }  # fmt: skip
    return replace(lf.recipes.distilled(model, steps=50), **settings | changes)


def moved(before, after):
    """By parameter, which entries changed."""
    before, after = (stock_weights(lf.with_norm_sites(one)) for one in (before, after))
    return {name: before[name] != after[name] for name in before if name != "unembed.W_U"}


def require_moved(before, after, mask):
    """Nothing moved outside of a mask, and nearly all inside."""
    inside = 0
    for name, changed in moved(before, after).items():
        chosen = mask.chosen.get(name, torch.zeros_like(changed))
        assert not (changed & ~chosen).any(), name
        inside += int((changed & chosen).sum())
    assert inside > 0.99 * mask.count


class TestOnlyTheMask:
    @pytest.mark.parametrize("make", [lambda r: r, Recipe.vanilla], ids=["removal", "control"])
    def test_moves(self, model, make):
        recipe = make(a_recipe(model))
        run = lf.remove_norms(model, recipe, TEXT, progress=False)
        mask = lf.select_parameters(model, *WORDS, seed=7)
        assert len(run.history) == 50
        require_moved(model, run.model, mask)
        assert lf.live_sites(run.model) == (() if recipe.events else lf.list_norm_sites(run.model))
        assert all(p.requires_grad for p in run.model.parameters())

    def test_moves_in_a_fine_tuning_that_is_interrupted(self, model, tmp_path):
        recipe = lf.recipes.finetuning(steps=50, batch=2, seed=7)
        recipe = replace(recipe, trainable=WORDS, weight_decay=0.3, precision="float32")
        recipe = replace(recipe, weight_average=0.8)
        options = {"progress": False, "checkpoint_every": 10}
        whole = lf.finetune(model, recipe, TEXT, **options)
        with pytest.raises(PausedError):
            lf.finetune(model, recipe, TEXT, out=tmp_path / "run", minutes=1e-9, **options)
        resumed = lf.finetune(model, recipe, TEXT, out=tmp_path / "run", resume=True, **options)
        require_moved(model, resumed.model, lf.select_parameters(model, *WORDS, seed=7))
        assert [r.loss for r in resumed.history] == [r.loss for r in whole.history]
        for name, W in stock_weights(whole.model).items():
            assert torch.equal(W, stock_weights(resumed.model)[name]), name

    def test_moves_in_a_variant(self, model):
        dyt = lf.to_dyt(model, tokens=TEXT).model
        recipe = replace(lf.recipes.finetuning(steps=5, batch=2), trainable="norms:ln1")
        run = lf.finetune(dyt, recipe, TEXT, progress=False)
        mask = lf.select_parameters(dyt, "norms:ln1")
        assert any("alpha" in name for name in mask.chosen)
        require_moved(dyt, run.model, mask)


class TestOptimizer:
    def test_entries_are_trained_as_in_a_whole_parameter(self):
        """AdamW treats entries one by one: those of a part are those of the whole."""
        torch.manual_seed(0)
        start, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.4
        whole, part = (nn.Parameter(start.clone()) for _ in range(2))
        settings = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.2}
        reference = torch.optim.AdamW([whole], **settings)
        model = live_model("gpt2", torch.float32, n_layer=1)
        name = "blocks.0.mlp.W_in"
        shape = model.blocks[0].mlp.W_in.shape
        model.blocks[0].mlp.W_in.data.view(-1)[:30] = start.view(-1)
        model, over = lf.with_norm_sites(model), torch.zeros(shape, dtype=torch.bool)
        over.view(-1)[:30] = mask.view(-1)
        recipe = replace(lf.recipes.finetuning(steps=9, batch=1), **settings)
        optimizer = adamw(model, replace(recipe, trainable=lf.ParameterMask({name: over})))
        W_in = model.blocks[0].mlp.W_in
        for step in range(9):
            grad = torch.randn(30, generator=torch.Generator().manual_seed(step))
            whole.grad = grad.view(6, 5)
            W_in.grad = torch.zeros(shape)
            W_in.grad.view(-1)[:30] = grad
            reference.step()
            optimizer.select()
            optimizer.step()
            part.data = torch.where(mask, whole.data, start)
            torch.testing.assert_close(W_in.data.view(-1)[:30].view(6, 5), part.data)
        assert not torch.equal(whole.data, start)

    def test_has_two_numbers_for_each_entry(self, model):
        mask = lf.select_parameters(model, *WORDS)
        run_model = lf.with_norm_sites(model)
        optimizer = adamw(run_model, a_recipe(model))
        assert isinstance(optimizer, PartialAdamW)
        run_model(TEXT[:2], return_type="loss").backward()
        optimizer.select()
        optimizer.step()
        kept = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
        assert sum(x.numel() for x in kept) == 2 * mask.count

    def test_the_gradient_is_that_of_the_mask(self, model):
        recipe = replace(lf.recipes.finetuning(steps=2, batch=2), precision="float32")
        sited = lf.with_norm_sites(model)
        mask = lf.select_parameters(model, *WORDS)
        every = lf.finetune(model, recipe, TEXT, progress=False)
        run = lf.finetune(model, replace(recipe, trainable=mask), TEXT, progress=False)
        assert run.history[0].loss == every.history[0].loss
        batch = ShuffledSequences(TEXT, seed=recipe.seed).take(2)
        sited(batch, return_type="loss").backward()
        squares = sum(
            (W.grad[mask.chosen[name]] ** 2).sum().item()
            for name, W in parameters_of(sited).items()
            if name in mask.chosen
        )
        assert run.history[0].gradient == pytest.approx(squares**0.5, rel=1e-4)
        assert every.history[0].gradient > run.history[0].gradient


class TestWords:
    @ALL
    def test_components_are_together_all(self, kind):
        """On every architecture: no parameter is outside of them, and none in two."""
        model = live_model(kind)
        every = lf.select_parameters(model, "all")
        assert every.count == sum(
            W.numel() for W in parameters_of(lf.with_norm_sites(model)).values()
        )
        names = {part.name for part in lf.list_weight_components(model)} - {"unembed"}
        one_by_one = [lf.select_parameters(model, name) for name in sorted(names)
                      if _has(model, name)]  # fmt: skip
        tied = "unembed.W_U" not in every.chosen
        more = [] if tied else [lf.select_parameters(model, "unembed")]
        assert sum(mask.count for mask in (*one_by_one, *more)) == every.count
        together = lf.ParameterMask({})
        for mask in (*one_by_one, *more):
            together |= mask
        assert together == every

    @pytest.mark.parametrize(
        ("word", "named"),
        [
            ("norms:ln2", {"blocks.0.ln2.w", "blocks.0.ln2.b", "blocks.1.ln2.w", "blocks.1.ln2.b"}),
            ("norms:L1", {f"blocks.1.{ln}.{x}" for ln in ("ln1", "ln2") for x in "wb"}),
            ("biases:mlp", {f"blocks.{n}.mlp.b_{x}" for n in (0, 1) for x in ("in", "out")}),
            ("embed", {"embed.W_E"}),
            ("heads:L0H2", {f"blocks.0.attn.{x}" for x in
                            ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")}),
        ],
    )  # fmt: skip
    def test_mean_what_they_say(self, model, word, named):
        mask = lf.select_parameters(model, word)
        assert mask.chosen.keys() == named
        if word == "heads:L0H2":
            for chosen in mask.chosen.values():
                assert chosen[2].all()
                assert chosen.sum() == chosen[2].numel()

    def test_a_share_is_drawn_by_the_seed(self, model):
        norms = lf.select_parameters(model, "norms")
        one, same, other = (
            lf.select_parameters(model, "20% of norms", seed=seed) for seed in (0, 0, 1)
        )
        assert one == same
        assert one != other
        assert one.count == round(0.2 * norms.count)
        assert one | norms == norms
        assert one == lf.random_subset(norms, 0.2)

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("nroms", "no component 'nroms'; the nearest is norms"),
            ("norm:ln2", "no group 'norm'"),
            ("norms:ln7", "no parameters for 'norms:ln7'"),
            ("scalers", "no parameters for 'scalers'"),
            ("unembed", "tied to the embedding; name it: embed"),
            ("0% of norms", "must lie in 0..100"),
            ("200% of norms", "must lie in 0..100"),
            ("1.2.3% of norms", "is not a share"),
        ],
    )
    def test_that_mean_nothing_are_refused(self, model, word, message):
        with pytest.raises(RecipeError, match=message):
            lf.select_parameters(model, word)

    def test_a_llama_has_no_biases_to_train(self):
        llama = live_model("llama", torch.float32)
        with pytest.raises(RecipeError, match="no parameters for 'biases'"):
            lf.select_parameters(llama, "biases")


def _has(model, name):
    try:
        return lf.select_parameters(model, name).count > 0
    except RecipeError:
        return False


class TestNothing:
    @pytest.mark.parametrize("trainable", [(), "0.0001% of norms", lf.ParameterMask({})])
    def test_to_train_is_refused(self, model, trainable):
        recipe = replace(lf.recipes.finetuning(steps=2, batch=2), trainable=trainable)
        with pytest.raises(RecipeError, match="leaves nothing to train"):
            lf.finetune(model, recipe, TEXT, progress=False)

    def test_that_needs_a_gradient(self, model):
        still = live_model("gpt2", torch.float32, n_layer=2)
        for site in ("ln_final", "blocks.0.ln2"):
            still.get_submodule(site).requires_grad_(False)
        recipe = replace(lf.recipes.finetuning(steps=2, batch=2), trainable="norms:ln_final")
        with pytest.raises(RecipeError, match="requires_grad is False"):
            lf.finetune(still, recipe, TEXT, progress=False)

    def test_all_of_the_command_line_is_all(self):
        recipe = replace(lf.recipes.finetuning(steps=2, batch=2), trainable=("all",))
        assert recipe.trainable == "all"


class TestMask:
    @pytest.mark.parametrize("trainable", ["all", WORDS, "mask"])
    def test_a_recipe_is_written_and_read(self, model, trainable):
        if trainable == "mask":
            trainable = lf.select_parameters(model, *WORDS, "embed")
        recipe = replace(a_recipe(model), trainable=trainable)
        again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
        assert again.trainable == recipe.trainable
        assert again == recipe

    @pytest.mark.parametrize("change", [{"bits": "AAAA"}, {"bits": "x"}, {"shape": [999_999]}])
    def test_a_damaged_one_is_refused(self, model, change):
        plain = replace(a_recipe(model), trainable=lf.select_parameters(model, "L0H1")).to_json()
        plain["trainable"]["mask"]["blocks.0.attn.W_Q"] |= change
        with pytest.raises(RecipeError, match="not a recipe"):
            Recipe.from_json(plain)

    def test_of_another_model_is_refused(self, model):
        other = lf.select_parameters(live_model("gpt2", torch.float32, n_layer=3), "norms")
        wide = lf.ParameterMask({"ln_final.w": torch.ones(7, dtype=torch.bool)})
        recipe = replace(lf.recipes.finetuning(steps=2, batch=2), trainable=other)
        with pytest.raises(RecipeError, match=r"blocks\.2\..* which the model does not have"):
            lf.finetune(model, recipe, TEXT, progress=False)
        with pytest.raises(RecipeError, match=r"the mask of ln_final.w is \[7\]"):
            lf.finetune(model, replace(recipe, trainable=wide), TEXT, progress=False)
        with pytest.raises(RecipeError, match=r"must be torch\.bool"):
            lf.ParameterMask({"ln_final.w": torch.ones(32)})

    def test_a_cap_on_embeddings_needs_them(self, model):
        with pytest.raises(RecipeError, match="embedding_cap shortens rows of W_E"):
            a_recipe(model, embedding_cap=1.3)
        assert a_recipe(model, embedding_cap=1.3, trainable=("norms", "embed")).embedding_cap == 1.3
