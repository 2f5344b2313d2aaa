"""The depth report against brute force, at the edges, and in other bases of the stream."""

import copy
import math

import pytest
import torch
from support.loaded import live_model
from support.typechecking import TypeCheckError

import lnfree_interp as lf
from lnfree_interp.data.named import spread
from lnfree_interp.errors import DataError
from lnfree_interp.models.folding import is_reader, writes_to_stream

ARCHITECTURES = ["gpt2", "llama-grouped", "neox", "gemma2"]


def report_of(model, tokens, **options):
    return lf.depth_report(model, tokens, progress=False, **options)


def random_tokens(model, sequences=4, pos=10, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.cfg.d_vocab, (sequences, pos), generator=generator)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def stock(request):
    return live_model(request.param)


def jacobian(model, layer, tokens):
    """The whole Jacobian of a block's stream at the last position by the stream there."""
    name = "resid_pre"
    _, cache = model.run_with_cache(tokens, prepend_bos=False)
    resid, block = cache[name, layer], model.blocks[layer]

    def last(x):
        return block(torch.cat([resid[:, :-1], x[None, None]], 1))[0, -1]

    return torch.autograd.functional.jacobian(last, resid[0, -1])


def differences(model, layer, tokens):
    """J - I of a block at each prompt."""
    eye = torch.eye(model.cfg.d_model, dtype=torch.float64)
    return [jacobian(model, layer, row[None]) - eye for row in tokens]


def exact_distance(model, layer, tokens):
    """The Frobenius norm over prompts; without the mean of what is written if norms subtract it."""
    found = differences(model, layer, tokens)
    if model.cfg.normalization_type == "LN":
        found = [one - one.mean(0, keepdim=True) for one in found]
    squares = torch.stack([one.square().sum() for one in found])
    return (squares.mean() / model.cfg.d_model).sqrt().item()


def test_distance_and_eigenvalues_are_those_of_the_whole_jacobian(stock):
    tokens = random_tokens(stock, 2)
    report = report_of(stock, tokens, prompts=2, vectors=300, eigenvalues=6)
    for layer in range(stock.cfg.n_layers):
        for prompt, difference in enumerate(differences(stock, layer, tokens)):
            every = torch.linalg.eigvals(difference)
            found = report.eigenvalues[layer, prompt]
            largest = every.abs().sort(descending=True).values[:6]
            torch.testing.assert_close(found.abs(), largest, rtol=1e-4, atol=0)
            apart = (found[:, None] - every).abs().amin(1)  # with their signs
            assert (apart < 1e-3 * found.abs()).all()
            assert ((found[:, None] + every).abs().amin(1) > 1e-2 * found.abs()).any()
        expected = exact_distance(stock, layer, tokens)
        assert report.jacobian_distance[layer].item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("prompts", [1, 6])
def test_the_error_of_the_distance_is_as_large_as_its_error(stock, prompts):
    """Over seeds of the vectors; with several prompts that error is a part of the whole."""
    tokens = random_tokens(stock, prompts)
    exact = exact_distance(stock, 1, tokens)
    far, errors = [], []
    for seed in range(20):
        report = report_of(stock, tokens, prompts=prompts, vectors=12, eigenvalues=0, seed=seed)
        far.append(report.jacobian_distance[1].item() - exact)
        errors.append(report.jacobian_distance_error[1].item())
    spread = (sum(x * x for x in far) / len(far)) ** 0.5
    mean = sum(errors) / len(errors)
    assert mean > 0.5 * spread
    if prompts == 1:
        assert mean < 2 * spread
    else:
        each = torch.tensor([exact_distance(stock, 1, row[None]) for row in tokens])
        of_prompts = each.square().std() / prompts**0.5 / (2 * exact)
        assert 0.8 * of_prompts < mean < 2 * (of_prompts + spread)


def test_what_a_block_is_for_is_the_loss_of_the_model_in_which_it_writes_nothing(stock):
    tokens = random_tokens(stock)
    report = report_of(stock, tokens, eigenvalues=0)
    before = lf.evaluate_loss(stock, tokens).mean
    assert report.loss == pytest.approx(before, rel=1e-12)
    for layer in range(stock.cfg.n_layers):
        after = lf.evaluate_loss(silenced(stock, layer), tokens).mean
        assert report.loss_without[layer].item() == pytest.approx(after - before, rel=1e-9)
        assert abs(after - before) > 1e-4


def silenced(model, layer):
    """The model with a block that writes nothing."""
    quiet = copy.deepcopy(model)
    block = quiet.blocks[layer]
    parts = [block.attn.W_O, block.attn.b_O, block.mlp.W_out, block.mlp.b_out]
    for name in ("ln1_post", "ln2_post"):
        if getattr(block, name, None) is not None:
            parts += [*getattr(block, name).parameters()]
    for W in parts:
        W.data.zero_()
    return quiet


def test_a_block_that_writes_nothing_turns_nothing_and_costs_nothing(stock):
    quiet = silenced(stock, 1)
    report = report_of(quiet, random_tokens(stock), prompts=2)
    assert report.angles[1, 2] == 0
    assert report.jacobian_distance[1] == 0
    assert report.jacobian_distance_error[1] == 0
    assert (report.eigenvalues[1] == 0).all()
    assert report.loss_without[1] == 0
    for layer in {*range(stock.cfg.n_layers)} - {1}:  # all others do something
        assert report.angles[layer, layer + 1] > 1e-3
        assert report.jacobian_distance[layer] > 1e-3
        assert report.eigenvalues[layer].abs().min() > 1e-4
        assert report.loss_without[layer] != 0


def test_variances_and_angles_are_those_of_the_cached_stream(stock):
    tokens, n = random_tokens(stock, 5), stock.cfg.n_layers
    report = report_of(stock, tokens, prompts=1, eigenvalues=0, batch=2)
    _, cache = stock.run_with_cache(tokens, prepend_bos=False)
    streams = [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in range(n))]
    if stock.cfg.normalization_type == "LN":
        streams = [x - x.mean(-1, keepdim=True) for x in streams]
    for place, x in enumerate(streams):
        variance = (x**2).mean(-1)
        torch.testing.assert_close(report.variance[place], variance[:, 1:].mean())
        torch.testing.assert_close(report.variance_first[place], variance[:, 0].mean())
    cosine = torch.cosine_similarity(streams[0][:, -1], streams[n][:, -1], dim=-1)
    expected = (cosine.clamp(-1, 1).arccos() / math.pi).mean()
    torch.testing.assert_close(report.angles[0, n], expected)
    torch.testing.assert_close(report.angles, report.angles.T)
    assert (report.angles.diagonal() == 0).all()


def test_the_report_knows_which_of_its_measures_are_about_the_function(folded, live, tokens):
    def measure(name):
        def metric(model):
            found = getattr(report_of(model, tokens, prompts=1, vectors=8, eigenvalues=4), name)
            return found.abs() if found.is_complex() else found

        return metric

    every = ("variance", "variance_first", "angles", "jacobian_distance")
    always = ("eigenvalues", "loss_without")
    report = report_of(folded, tokens, prompts=1)
    assert report.basis_free == always
    for name in always:
        checked = lf.gauge_check(measure(name), folded, bases=2)
        # Eigenvalues are found to a tolerance of their own.
        assert checked.error.relative < 1e-3, (name, checked)
    for name in every:
        assert lf.gauge_check(measure(name), folded, bases=1).error.relative > 0.01, name
    assert report_of(live, tokens, prompts=1).basis_free == (*every, *always)


def rewritten(model, write, read):
    """A copy whose stream is written, and read, in another basis."""
    changed = copy.deepcopy(model)
    for name, W in changed.named_parameters():
        if writes_to_stream(name):
            W.data = write(W.data)
        elif is_reader(name):
            W.data = read(W.data)
    return changed


@pytest.mark.parametrize("change", ["mean", "factor", "rotation"])
def test_what_live_norms_do_not_see_changes_nothing(change):
    kind = "llama-grouped" if change == "rotation" else "gpt2"
    model = live_model(kind)
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))
    if change == "rotation":
        for name, W in model.named_parameters():  # a gain stands in one basis
            if name.endswith((".w", "_w")) and "ln" in name:
                W.data.fill_(1.0)
        other = rewritten(model, lambda W: W @ turn, lambda W: turn.T @ W)
    elif change == "mean":
        other = rewritten(model, lambda W: W + 5 * W.mean(-1, keepdim=True), lambda W: W)
    else:
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = 0.0
        other = rewritten(model, lambda W: 10 * W, lambda W: W)
    tokens = random_tokens(model)
    before, after = (report_of(one, tokens, prompts=2, eigenvalues=0) for one in (model, other))
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-9, atol=0)
    scale = 100.0 if change == "factor" else 1.0
    torch.testing.assert_close(after.variance, scale * before.variance)
    torch.testing.assert_close(after.variance_first, scale * before.variance_first)
    torch.testing.assert_close(after.angles, before.angles)
    torch.testing.assert_close(after.loss_without, before.loss_without)
    for layer in range(3):  # the random vectors are not turned with the stream
        distances = [exact_distance(one, layer, tokens[:1]) for one in (model, other)]
        assert distances[1] == pytest.approx(distances[0], rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64])  # 3a + 3b is 3 (a + b) but for rounding
def test_a_users_hook_on_the_first_stream_acts_once(live, tokens):
    def louder(x, hook):
        return 3 * x

    without = copy.deepcopy(live)
    with live.hooks([("blocks.0.hook_resid_pre", louder)]):
        hooked = report_of(live, tokens, prompts=2)
    for W in (without.embed.W_E, without.pos_embed.W_pos):
        W.data.mul_(3)
    expected = report_of(without, tokens, prompts=2)
    torch.testing.assert_close(hooked.loss_without[1:], expected.loss_without[1:])
    torch.testing.assert_close(hooked.variance[1:], expected.variance[1:])


def test_a_model_that_overflows_has_a_report_without_eigenvalues(live, tokens):
    live.blocks[1].mlp.b_out.data[0] = torch.nan
    report = report_of(live, tokens, prompts=1)
    assert report.eigenvalues[2].isnan().all()
    assert math.isnan(report.loss)
    assert report.eigenvalues[0].isfinite().all()


def test_one_live_norm_that_reads_the_stream_fixes_the_basis(frozen, tokens):
    assert not report_of(frozen, tokens, prompts=1, eigenvalues=0).basis_fixed
    lf.get_norm(frozen, "blocks.1.ln2").thaw()
    assert report_of(frozen, tokens, prompts=1, eigenvalues=0).basis_fixed


def test_a_norm_inside_a_sublayer_does_not_fix_the_basis(frozen, tokens):
    inside = lf.to_sub_ln(frozen).model
    assert lf.live_sites(inside)
    assert not report_of(inside, tokens, prompts=1, eigenvalues=0).basis_fixed


def test_a_norm_of_what_is_written_fixes_the_basis(frozen, tokens):
    """It divides by a length in the stream's own channels."""
    behind = lf.to_peri_ln(frozen).model
    assert {site.kind for site in lf.live_sites(behind)} == {"ln1_post", "ln2_post"}
    assert report_of(behind, tokens, prompts=1, eigenvalues=0).basis_fixed


def test_factors_of_the_stream_are_a_change_of_its_units():
    """NormFormer without live norms, and the fold of it, in whose weights they are: one report."""
    stock = live_model("gpt2")
    model = lf.to_normformer(stock).model
    for layer, name in enumerate(name for name in lf.list_scalers(model) if "resid" in name):
        model.get_submodule(name).w.data *= torch.linspace(0.5, 2 + layer, 32).double()
    for site in lf.list_norm_sites(model):
        lf.freeze_site(model, site, 0.5)
    tokens = random_tokens(model)
    before, after = (report_of(one, tokens, prompts=2) for one in (model, lf.fold(model)))
    for name in ("loss_without", "variance", "angles", "jacobian_distance"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), msg=name)
    torch.testing.assert_close(after.spectral_radius, before.spectral_radius, rtol=1e-4, atol=0)
    assert before.loss_without.abs().min() > 1e-4
    model.blocks[1].resid_scale.w.data[3] = 0
    assert report_of(model, tokens, prompts=1).jacobian_distance.isfinite().all()


def test_a_crmsnorm_sees_the_stream_that_it_stands_for():
    """Variances and angles are those of the RMSNorm model that it was made of."""
    stock = live_model("gpt2")
    tokens = random_tokens(stock)
    rms, crms = (one.model for one in (lf.to_rms(stock), lf.to_crms(stock, "drop")))
    whole, less = (report_of(one, tokens, prompts=2, vectors=400, eigenvalues=0)
                   for one in (rms, crms))  # fmt: skip
    assert rms.cfg.d_model == crms.cfg.d_model + 1
    torch.testing.assert_close(less.variance, whole.variance)
    torch.testing.assert_close(less.variance_first, whole.variance_first)
    torch.testing.assert_close(less.angles, whole.angles)
    d = crms.cfg.d_model
    S = torch.cat([torch.eye(d), -torch.ones(1, d)]).double()
    sampled = spread(tokens, 2)
    for layer in range(3):
        squares = [(S @ one @ torch.linalg.pinv(S)).square().sum()
                   for one in differences(crms, layer, sampled)]  # fmt: skip
        exact = (torch.stack(squares).mean() / (d + 1)).sqrt().item()
        assert less.jacobian_distance[layer].item() == pytest.approx(exact, rel=0.05)


def test_frame_repr_and_figures_have_a_row_for_each_block(live, tokens):
    report = report_of(live, tokens)
    frame = report.to_frame()
    assert frame["layer"].tolist() == [0, 1, 2]
    assert frame["loss_without"].idxmin() == report.least_needed
    assert f"block {report.least_needed} is needed least" in repr(report)
    drawn = lf.plots.depth({"original": report, "lnfree": report})
    assert [len(line.x) for line in drawn.data] == [4, 3, 3, 3] * 2
    assert list(drawn.data[3].y) == report.loss_without.tolist()
    errors = [line.error_y.array for line in drawn.data]
    assert [None if one is None else len(one) for one in errors] == [None, None, 3, None] * 2
    assert lf.plots.angles(report).data[0].z[0][-1] == report.angles[0, -1].item()
    spectrum = lf.plots.spectrum(report)
    assert list(spectrum.data[1].y) == report.eigenvalues[0].abs().flatten().tolist()


def test_model_and_gradients_stay_as_they_are(live, tokens):
    before = {name: W.clone() for name, W in live.named_parameters()}
    report_of(live, tokens)
    assert all(W.grad is None and torch.equal(W, before[n]) for n, W in live.named_parameters())
    assert not any(point._forward_hooks for point in live.hook_dict.values())


def test_numbers_that_are_not_allowed_are_refused(live, tokens):
    for wrong in ({"prompts": 0}, {"vectors": 1}, {"eigenvalues": -1}, {"eigenvalues": 31}):
        with pytest.raises(DataError, match="give at least 1 prompt"):
            report_of(live, tokens, **wrong)
    with pytest.raises(DataError, match="tokenized for another model"):
        report_of(live, tokens + 300)
    with pytest.raises(DataError, match="at least one depth report"):
        lf.plots.depth({})
    with pytest.raises((DataError, TypeCheckError)):
        report_of(live, tokens[0])
    with pytest.raises(DataError, match="has no eigenvalues"):
        lf.plots.spectrum(report_of(live, tokens, eigenvalues=0))


def test_the_evaluation_has_the_least_needed_block(live, folded, tokens):
    options = {"effects": False, "neurons": 0, "pairs": 0}
    found = lf.evaluate({"live": live, "free": folded}, tokens, **options)
    label = "loss without the least needed block, change"
    report = report_of(live, tokens, prompts=1, eigenvalues=0)
    assert found.to_frame().loc[label, "live"] == pytest.approx(report.loss_without.min().item())
    assert "loss_without_block" in found.to_json()
    without = lf.evaluate(live, tokens, depth=False, **options)
    assert label not in without.to_frame().index
