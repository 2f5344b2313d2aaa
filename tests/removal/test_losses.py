"""The loss in chunks is the loss, and training here is training a stock HookedTransformer."""

import json
from dataclasses import replace

import pytest
import torch
from support.loaded import live_model
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.data.sequences import ShuffledSequences
from lnfree_interp.errors import RecipeError
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.removal import chunked_loss
from lnfree_interp.removal.chunked_loss import LazyLogits
from lnfree_interp.removal.losses import TERMS, Objective, distillation_loss, scale_anchor_loss
from lnfree_interp.removal.plan import plan
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import Ramp, all_at_once, sequential_sites
from lnfree_interp.removal.settings import Guard, Statistics
from lnfree_interp.removal.statistics import TokenGroups
from lnfree_interp.removal.trainer import CROSS_ENTROPY


@pytest.fixture(params=["gpt2", "neox", "llama", "gemma2"])
def pair(request):
    """A model with sites, an original to distil from, and tokens; float64."""
    student, teacher = (lf.with_norm_sites(live_model(request.param, seed=seed)) for seed in (0, 1))
    tokens = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(1))
    return student, teacher, tokens


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [7, 1000])
def test_the_loss_in_chunks_is_the_loss(pair, share, rows, monkeypatch):
    """Value and every gradient, against all logits at once."""
    student, teacher, tokens = pair
    monkeypatch.setattr(chunked_loss, "_rows", lambda device, d_vocab: rows)
    logits = student(tokens)
    ce = next_token_loss(logits.double(), tokens)
    kl = distillation_loss(logits, teacher(tokens).detach())
    anchor = scale_anchor_loss(
        student(tokens, stop_at_layer=3), _ordinary(tokens), centred=student.ln_final.centred
    )
    expected = torch.lerp(ce, kl, share) + 0.2 * anchor
    expected.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()

    objective = Objective(student, teacher, torch.float64, TokenGroups(0))
    found = objective(tokens, {"distillation": share, "scale_anchor": 0.2})
    (2 * found.total).backward()
    # Losses are taken in float32 at least where all logits are there at once.
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.terms["cross_entropy"].item() == pytest.approx(ce.item(), rel=1e-6)
    if share:
        assert found.terms["distillation"].item() == pytest.approx(kl.item(), rel=1e-5)
    largest = max(g.abs().max() for g in gradients.values() if g is not None)
    for name, parameter in student.named_parameters():
        if gradients[name] is not None:
            error = (parameter.grad / 2 - gradients[name]).abs().max()
            assert error <= 1e-6 * largest, name
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("caps", [(0.0, 2.0), (2.0, 0.0), (3.0, 1.5)], ids=str)
def test_each_model_caps_its_own_logits(pair, caps):
    student, teacher, tokens = pair
    for model, cap in zip((student, teacher), caps, strict=True):
        model.cfg.output_logits_soft_cap = cap
    expected = distillation_loss(student(tokens), teacher(tokens))
    assert expected > 1e-3
    objective = Objective(student, teacher, torch.float64, TokenGroups(0))
    found = objective(tokens, {"distillation": 1.0}).total
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def _ordinary(tokens):
    groups = TokenGroups(0)
    groups.mark(tokens)
    return groups.of["ordinary"]


def test_the_chunked_loss_is_exact_in_float64():
    h, W = torch.randn(50, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    b, theirs = torch.randn(30, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    targets = torch.randint(30, (50,))
    leaves = [x.requires_grad_() for x in (h, W, b)]
    log_p = (h @ W.T + b).log_softmax(-1)
    q = (theirs @ W.T).softmax(-1).detach()
    ce = torch.nn.functional.nll_loss(log_p, targets)
    kl = (q * (q.log() - log_p)).sum(-1).mean()
    (0.6 * ce + 0.4 * kl).backward()
    expected = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    total, *parts = chunked_loss.logits_loss(
        LazyLogits(h, W, b), targets, original=LazyLogits(theirs, W.detach()),
        share=0.4, dtype=torch.float64,
    )  # fmt: skip
    total.backward()
    torch.testing.assert_close(torch.stack(parts), torch.stack([ce, kl]), rtol=1e-13, atol=1e-13)
    for x, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=1e-12, atol=1e-14)


def test_a_hopeless_token_has_a_finite_loss_and_gradient():
    h = torch.tensor([[300.0], [1.0]], requires_grad=True)
    W = torch.tensor([[1.0], [-1.0]])
    total, ce, _ = chunked_loss.logits_loss(LazyLogits(h, W), torch.tensor([1, 0]))
    assert ce.item() == pytest.approx((600 + torch.log1p(torch.tensor(-2.0).exp()).item()) / 2)
    total.backward()
    assert h.grad.isfinite().all()
    assert h.grad[0].item() == pytest.approx(1.0)


def test_whoever_looks_at_logits_sees_them(pair):
    student, _, tokens = pair
    objective = Objective(student, None, torch.float64, TokenGroups(0))
    plain = objective(tokens, CROSS_ENTROPY).total.item()
    seen = []

    def double(logits, hook):
        seen.append(logits.shape)
        return 2 * logits

    with student.hooks([("unembed.hook_out", lambda x, hook: seen.append(x.shape))]):
        assert objective(tokens, CROSS_ENTROPY).total.item() == pytest.approx(plain, rel=1e-6)
    with student.hooks([("unembed.hook_out", double)]):
        assert objective(tokens, CROSS_ENTROPY).total.item() != pytest.approx(plain, rel=1e-3)
    with student.hooks([("unembed.hook_in", lambda x, hook: 0 * x)]):
        silenced = objective(tokens, CROSS_ENTROPY).total.item()
    biased = student.b_U.any()
    assert biased or silenced == pytest.approx(torch.tensor(300.0).log().item(), rel=1e-5)
    assert seen == [(3, 20, 300)] * 2


def test_evaluation_takes_no_gradient(pair):
    student, _, tokens = pair
    objective = Objective(student, None, torch.float64, TokenGroups(0))
    with torch.no_grad():
        loss = objective(tokens, CROSS_ENTROPY)
    assert not loss.total.requires_grad
    assert loss.terms["cross_entropy"].item() == pytest.approx(
        lf.evaluate_loss(student, tokens).mean, rel=1e-6
    )


def test_the_anchor_has_a_fixed_target_or_the_batches_own():
    resid = torch.tensor([[[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]]])
    ordinary = torch.tensor([[False, True, True]])
    assert scale_anchor_loss(resid, ordinary).item() == pytest.approx((4 + 1 + 1) / 3, rel=1e-4)
    fixed = scale_anchor_loss(resid, ordinary, 2.0).item()
    assert fixed == pytest.approx((1 + 0 + 4) / 3, rel=1e-4)
    shifted = scale_anchor_loss(resid + 3, ordinary, 2.0)
    assert shifted.item() == pytest.approx(fixed, rel=1e-4)
    uncentred = scale_anchor_loss(resid + 3, ordinary, 2.0, centred=False).item()
    assert uncentred == pytest.approx(
        (((10**0.5) - 2) ** 2 + ((13**0.5) - 2) ** 2 + 9) / 3, rel=1e-4
    )
    none = scale_anchor_loss(resid, torch.zeros_like(ordinary))  # a batch of special tokens only
    assert none.isfinite()


def test_training_is_training_a_stock_model():
    """The same losses as a plain loop around a stock HookedTransformer, step by step."""
    steps, batch = 8, 4
    stock = live_model("gpt2", torch.float32, n_layer=2)
    data = torch.randint(300, (batch * steps, 24), generator=torch.Generator().manual_seed(3))
    recipe = Recipe(
        events=(), steps=steps, batch=batch, micro_batch=batch, lr=1e-3, warmup=0, final_lr=1.0,
        weight_decay=0.0, clip=0.5, precision="float32", scale_anchor=0.0,
    )  # fmt: skip
    hooks = [("blocks.0.hook_mlp_out", lambda x, hook: 1.1 * x)]
    run = lf.remove_norms(stock, recipe, data, fwd_hooks=hooks, progress=False)

    sequences = ShuffledSequences(data, recipe.seed)
    # Stock keeps two copies of a tied embedding: give it one gradient for both.
    optimizer = torch.optim.AdamW(
        [p for name, p in stock.named_parameters() if not name.startswith("unembed")],
        lr=1e-3, betas=recipe.betas, weight_decay=0.0,
    )  # fmt: skip
    for record in run.history:
        tokens = sequences.take(batch)
        with stock.hooks(hooks):
            loss = stock(tokens, return_type="loss")
        loss.backward()
        stock.W_E.grad += stock.W_U.grad.T
        stock.unembed.W_U.grad = stock.unembed.b_U.grad = None
        torch.nn.utils.clip_grad_norm_(
            [p for g in optimizer.param_groups for p in g["params"]], 0.5
        )
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            stock.unembed.W_U.copy_(stock.W_E.T)
        assert record.loss == pytest.approx(loss.item(), rel=1e-5), record.step
    lf.compare_logits(run.model, stock).require("after training", 1e-4)


def test_only_what_the_architecture_has_is_trained():
    """A bias in a Llama, or an unembedding bias anywhere, would be one that nobody can export."""
    llama = live_model("llama", torch.float32)
    data = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(3))
    recipe = Recipe(
        events=all_at_once(llama, step=0), steps=4, batch=4, lr=1e-4, warmup=0, final_lr=1.0,
        statistics=Statistics(sequences=4), guard=Guard(above_best=1e3),
    )  # fmt: skip
    run = lf.remove_norms(llama, recipe, data, progress=False)
    moved = {
        name
        for name, p in run.model.named_parameters()
        if not torch.equal(p, dict(llama.named_parameters())[name.replace(".ln1.qk.", ".ln1.")])
    }
    leaves = {name.rpartition(".")[2].lstrip("_") for name in moved}
    assert leaves == {"W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "w"}


def test_distillation_fades_as_its_ramp_says():
    model = live_model("gpt2", torch.float32, n_layer=2)
    data = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(3))
    recipe = Recipe(
        events=all_at_once(sequential_sites(2), step=2), steps=8, batch=4, lr=1e-4, warmup=0,
        final_lr=1.0, distillation=Ramp(1.0, 0.0, 0, 5), statistics=Statistics(sequences=4),
    )  # fmt: skip
    run = lf.remove_norms(model, recipe, data, progress=False)
    distilled = [record.losses["distillation"] for record in run.history]
    assert all(kl > 0 for kl in distilled[1:5])
    assert distilled[5:] == [0.0] * 3  # the original is not asked any more


def test_frozen_sites_have_the_gradient_of_autograd(live, tokens):
    """The hand-written backward of the frozen map, against plain operations."""
    model = freeze_all(live)
    loss = model(tokens, return_type="loss")
    loss.backward()
    fused = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sites = [str(site) for site in lf.list_norm_sites(model)]
    looking = [(f"{site}.hook_scale", lambda x, hook: None) for site in sites]
    with model.hooks(looking):
        model(tokens, return_type="loss").backward()
    largest = max(g.abs().max() for g in fused.values())
    tolerance = 1e-12 if live.cfg.dtype == torch.float64 else 1e-5
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - fused[name]).abs().max() <= tolerance * largest, name


def random_logits():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(300, (2, 24), generator=generator)
    return tokens, *torch.randn(2, 2, 24, 300, generator=generator).unbind()


def test_losses_by_hand():
    data, logits, _ = random_logits()
    expected = -logits.log_softmax(-1)[:, :-1].gather(-1, data[:, 1:, None])
    torch.testing.assert_close(next_token_loss(logits, data), expected.mean())

    resid = torch.tensor([[[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]]], requires_grad=True)
    ordinary = torch.tensor([[False, True, True]])
    loss = scale_anchor_loss(resid, ordinary)  # sigma 1, 2, 4; target 3
    assert loss.item() == pytest.approx((4 + 1 + 1) / 3, rel=1e-4)
    loss.backward()
    # Each token is pulled towards the target, position 0 too; the target itself is not pulled.
    assert resid.grad[0, 0, 0].item() == pytest.approx(2 / 3 * (1 - 3) * 0.5, rel=1e-4)


def test_distillation_by_hand():
    _, logits, teacher = random_logits()
    p, q = teacher.softmax(-1)[:, :-1], logits.softmax(-1)[:, :-1]
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(logits, teacher), expected, rtol=1e-4, atol=1e-6)
    assert distillation_loss(logits, logits).abs() < 1e-6


def test_position_0_and_end_of_text_are_not_ordinary(gpt2_folder):
    model = lf.load(gpt2_folder)
    tokens = torch.tensor([[5, model.tokenizer.eos_token_id, 7]])
    groups = TokenGroups(model.tokenizer.eos_token_id)
    groups.mark(tokens)
    assert groups.of["ordinary"].tolist() == [[False, False, True]]
    assert groups.of["end_of_text"].tolist() == [[False, True, False]]


def test_a_new_term_is_one_function(monkeypatch, tmp_path):
    """It is weighted, logged by its name, and trains the model."""
    model = live_model("gpt2", torch.float32, n_layer=2)
    data = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(3))
    seen = []

    def size_of_the_stream(forward_pass):
        seen.append(forward_pass.original_resid is not None)
        return forward_pass.resid.pow(2).mean()

    monkeypatch.setitem(TERMS, "size", size_of_the_stream)
    recipe = Recipe(
        events=(), steps=6, batch=4, lr=1e-2, warmup=0, final_lr=1.0, precision="float32",
        distillation=0.5, losses={"size": Ramp(1.0, 0.0, 2, 5)}, guard=Guard(above_best=1e3),
    )  # fmt: skip
    assert recipe.loss_weights(0) == {
        "cross_entropy": 0.5, "distillation": 0.5, "scale_anchor": 0.1, "size": 1.0,
    }  # fmt: skip
    run = lf.remove_norms(model, recipe, data, progress=False, out=tmp_path / "run")
    without = lf.remove_norms(model, replace(recipe, losses={}), data, progress=False)
    assert seen == [True] * 6
    sizes = [record.losses["size"] for record in run.history]
    resid = model.run_with_cache(data)[1]["resid_post", 1]
    assert sizes[0] == pytest.approx(resid.pow(2).mean().item(), rel=0.3)
    assert sizes[-1] < sizes[0]
    assert "size" not in without.history[0].losses
    assert run.history[-1].loss != without.history[-1].loss
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[3])
    assert list(line["losses"]) == list(recipe.loss_weights(0))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert "(1 to 0 (steps 2 to 5)) x size" in plan(recipe)
    assert recipe.vanilla().losses == {}


def test_a_term_that_does_not_exist_is_refused(tmp_path):
    model = live_model("gpt2", torch.float32, n_layer=2)
    recipe = Recipe(
        events=(), steps=2, batch=4, lr=1e-3, warmup=0, final_lr=1.0, losses={"no_such": 1.0}
    )
    with pytest.raises(RecipeError, match="no loss term 'no_such'; there are scale_anchor"):
        lf.remove_norms(
            model, recipe, torch.zeros(8, 16, dtype=torch.long), out=tmp_path / "run",
            progress=False,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
    for losses, message in (
        ({"no_such": -1.0}, "the weight of no_such cannot be negative"),
        ({"distillation": 1.0}, "distillation is a field of the recipe"),
    ):
        with pytest.raises(RecipeError, match=message):
            replace(recipe, losses=losses)
