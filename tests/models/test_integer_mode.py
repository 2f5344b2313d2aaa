"""A model in integers: every layer that should be, by its formula, and nothing else."""

import threading

import pytest
import torch
from support.architectures import ALL
from support.loaded import folded_model, frozen_model, live_model
from torch.nn import functional as F

import lnfree_interp as lf
from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.models import integer_layers
from lnfree_interp.models.integer_layers import Draws, rounded_gradient
from lnfree_interp.models.maps import MAPS, make_map
from lnfree_interp.models.norms import FrozenNorm, Norm, Scaler

TOKENS = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(1))


def sited_model(kind, **settings):
    return lf.with_norm_sites(live_model(kind, **settings))


def normal(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def linear_weights(model):
    """How many numbers the model's linear layers have."""
    of_products = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_gate")
    blocks = sum(
        W.numel()
        for name, W in model.named_parameters()
        if name.rpartition(".")[2].lstrip("_") in of_products
    )
    return blocks + model.W_U.numel()


class TestEveryLayer:
    @ALL
    @pytest.mark.parametrize("make", [sited_model, frozen_model, folded_model])
    def test_is_of_integers(self, kind, make):
        """Each weight is multiplied once for each token, and each norm reads each token once."""
        model = make(kind)
        found = lf.integer_operations(model, TOKENS)
        norms = [m for m in model.modules() if isinstance(m, Norm | FrozenNorm | Scaler)]
        shared = sum(name.endswith(".ln1.v") for name, _ in model.named_modules())
        assert found.counts["products, linear layers"] == TOKENS.numel() * linear_weights(model)
        widths = [0 if norm is None else norm.w.numel() for norm in norms]
        if make is sited_model:
            per_token = sum(widths) - shared * model.cfg.d_model
            heads = {
                "q_norm": model.cfg.n_heads,
                "k_norm": model.cfg.n_key_value_heads or model.cfg.n_heads,
            }
            for name, norm in model.named_modules():
                times = heads.get(name.rpartition(".")[2], 1)
                per_token += (times - 1) * (norm.w.numel() if isinstance(norm, Norm) else 0)
            counted = found.counts["products, norms and scalers"]
            assert counted == TOKENS.numel() * per_token
        assert found.norms_divide == (make is sited_model)
        assert (found.counts["square roots, norms"] > 0) == (make is sited_model)
        positions = 17 if model.cfg.positional_embedding_type == "standard" else 0
        assert found.counts["rows, embeddings"] == TOKENS.numel() + positions

    @ALL
    @pytest.mark.parametrize("make", [sited_model, frozen_model, folded_model])
    def test_is_nearer_to_itself_with_more_bits(self, kind, make):
        model = make(kind)
        exact = model(TOKENS)
        errors = {}
        for bits in (8, 12, 16):
            with lf.integer_arithmetic(model, bits):
                errors[bits] = ((model(TOKENS) - exact).norm() / exact.norm()).item()
        assert errors[16] < 2e-3
        assert errors[16] < errors[12] / 4 < errors[8] / 8
        assert torch.equal(model(TOKENS), exact)

    @pytest.mark.parametrize("make", [lf.to_normformer, lf.to_sub_ln, lf.to_dyt, lf.to_peri_ln])
    def test_of_a_variant_is_of_integers(self, make):
        model = make(live_model("gpt2", n_layer=2), **TEXT.get(make, {})).model
        found = lf.integer_operations(model, TOKENS)
        assert found.counts["products, linear layers"] == TOKENS.numel() * linear_weights(model)
        assert (found.counts["curves, norms"] > 0) == (make is lf.to_dyt)
        assert found.norms_divide

    def test_in_the_frozen_form_and_with_crms_norms_is_of_integers(self):
        frozen = lf.frozen_form(frozen_model("gpt2"))
        counts = lf.integer_operations(frozen, TOKENS).counts
        # TransformerLens' blocks call ln1 for queries, keys and values.
        assert counts["products, norms and scalers"] == 13 * TOKENS.numel() * frozen.cfg.d_model
        assert counts["square roots, norms"] == 0
        crms = lf.to_crms(live_model("gpt2"), basis="drop").model
        counts = lf.integer_operations(crms, TOKENS).counts
        assert counts["square roots, norms"] == 13 * TOKENS.numel()


TEXT = {lf.to_dyt: {"tokens": TOKENS}}


class TestGradients:
    """Of each layer, against its formula in float64, with the rounding that was drawn."""

    @pytest.fixture(params=[8, 10, 16])
    def drawn(self, request, monkeypatch):
        """The width, and the rounded gradients in the order of their layers."""
        found = []

        def keep(dy, bits, seed):
            found.append(rounded_gradient(dy, bits, seed))
            assert torch.equal(found[-1].integers, rounded_gradient(dy, bits, seed).integers)
            return found[-1]

        monkeypatch.setattr(integer_layers, "rounded_gradient", keep)
        return request.param, found

    def run(self, bits, call, dy, *leaves):
        model = frozen_model("gpt2", n_layer=1)
        with lf.integer_arithmetic(model, bits):
            y = call()
        y.backward(dy)
        return y.detach(), [x.grad for x in leaves]

    @pytest.mark.parametrize("how", ["linear", "addmm"])
    def test_of_a_product(self, drawn, how):
        bits, found = drawn
        x, W, b = (normal(*s, seed=i) for i, s in enumerate([(3, 5, 7), (7, 4), (4,)]))
        leaves = [t.requires_grad_() for t in (x, W, b)]
        dy = normal(3, 5, 4, seed=9)

        def call():
            if how == "linear":
                return F.linear(x, W.T, b)
            return torch.addmm(b, x.flatten(0, 1), W).unflatten(0, (3, 5))

        y, (dx, dW, db) = self.run(bits, call, dy, *leaves)
        q, p = (lf.fixed_point(t, bits).value for t in (x, W))
        s = found[0].value.view_as(dy)
        assert len(found) == 1
        torch.testing.assert_close(y, q @ p + b.detach(), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(dx, s @ p.T, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(dW, q.flatten(0, 1).T @ s.flatten(0, 1), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(db, s.sum((0, 1)), rtol=1e-14, atol=1e-14)
        assert (s - dy).abs().max() < 2.0 ** found[0].exponent
        assert not torch.equal(s, dy)

    @pytest.mark.parametrize("how", ["lookup", "rows", "slice"])
    def test_of_an_embedding(self, drawn, how):
        bits, found = drawn
        model = frozen_model("gpt2", n_layer=1)
        W = model.W_pos if how == "slice" else model.W_E
        if how == "rows":
            model.embed = type(live_model("gpt2", n_layer=1).embed)(model.cfg).double()
            model.embed.W_E = W
        rows = torch.arange(17) if how == "slice" else TOKENS
        dy = normal(*rows.shape, W.shape[1])
        with lf.integer_arithmetic(model, bits):
            y = model.W_pos[:17, :] if how == "slice" else model.embed(TOKENS)
        y.backward(dy)
        s, table = found[0].value.view_as(dy), lf.fixed_point(W, bits).value
        assert torch.equal(y, table[rows])
        expected = torch.zeros_like(W)
        expected.index_put_((rows,), s, accumulate=True)
        torch.testing.assert_close(W.grad, expected, rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("state", ["live", "half", "frozen", "watched"])
    @pytest.mark.parametrize("name", MAPS)
    def test_of_a_norm(self, drawn, name, state):
        bits, found = drawn
        gain, bias = (torch.nn.Parameter(normal(6, seed=i)) for i in (1, 2))
        norm = Norm(make_map(name, 1e-5), gain, bias, factor=0.7).double()
        if state != "live":
            norm.freeze(1.3, gate=0.4 if state == "half" else 0.0)
        if state == "watched":
            norm.hook_scale.add_hook(lambda x, hook: x)
        x, dy = normal(2, 5, 6).requires_grad_(), normal(2, 5, 6, seed=3)
        y, (dx, dw, db) = self.run(bits, lambda: norm(x), dy, x, norm.w, norm.b)
        s = found[0].value
        q, p = (lf.fixed_point(t.detach(), bits).value for t in (x, norm.w * 0.7))
        q.requires_grad_()
        p.requires_grad_()

        def formula(q, p, b):
            centred = q - q.mean(-1, keepdim=True) if norm.centred else q
            own = norm.map(centred) if norm.map.pointwise else centred / norm.map.scale(centred)
            gate = norm.share_live
            return (gate * own + (0 if norm.live else (1 - gate) * centred / 1.3)) * p + b * 0.7

        expected = formula(q, p, norm.b.detach())
        expected.backward(s)
        torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dx, q.grad, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(dw, p.grad * 0.7, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(db, s.sum((0, 1)) * 0.7, rtol=1e-12, atol=1e-12)

    def test_of_a_scaler(self, drawn):
        bits, found = drawn
        scaler = Scaler(torch.nn.Parameter(normal(3)), each=2)
        x, dy = normal(4, 6, seed=1).requires_grad_(), normal(4, 6, seed=2)
        _, (dx, dw) = self.run(bits, lambda: scaler(x), dy, x, scaler.w)
        s, q = found[0].value, lf.fixed_point(x, bits).value
        torch.testing.assert_close(dx, s * lf.fixed_point(scaler.gain, bits).value)
        torch.testing.assert_close(dw, (s * q).sum(0).view(3, 2).sum(1))

    def test_are_not_drawn_in_the_order_of_the_backward_pass(self):
        draws = Draws("a")
        first, second = draws.next(), draws.next()
        draws.begin("a")
        assert (draws.next(), draws.next()) == (first, second)
        draws.begin("b")
        assert len({first, second, draws.next()}) == 3

    def test_have_the_mean_of_those_without_rounding(self):
        """Of 400 seeds, within 5 standard errors, for each entry of a weight."""
        model = sited_model("gpt2", n_layer=1)
        found = []
        for seed in range(400):
            with lf.integer_arithmetic(model, 6, seed=seed):
                logits = model.unembed(normal(2, 3, 32))
            found.append(torch.autograd.grad(logits.square().sum(), model.W_E)[0])
        found = torch.stack(found)
        x, W = lf.fixed_point(normal(2, 3, 32), 6), lf.fixed_point(model.W_E, 6)
        dy = 2 * (x.value @ W.value.T)
        expected = dy.flatten(0, 1).T @ x.value.flatten(0, 1)
        error = found.std(0) / 20
        assert (error > 0).any()
        assert ((found.mean(0) - expected).abs() <= 5.5 * error + 1e-9).all()


class TestNothingElse:
    def test_is_changed(self):
        model = sited_model("gpt2")
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        names = [set(m.__dict__) for m in model.modules()]
        exact = model(TOKENS)
        found = []

        def fail(x, hook):
            found.append(x)
            raise ZeroDivisionError

        hooked = model.hooks(fwd_hooks=[("unembed.hook_out", fail)])
        with pytest.raises(ZeroDivisionError), lf.integer_arithmetic(model, 4), hooked:
            model(TOKENS)
        assert not torch.equal(found[0], exact)
        assert torch.equal(model(TOKENS), exact)
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        assert [set(m.__dict__) for m in model.modules()] == names

    def test_is_changed_in_another_thread(self):
        model = sited_model("gpt2")
        exact, found = model(TOKENS), []
        with lf.integer_arithmetic(model, 4):
            thread = threading.Thread(target=lambda: found.append(model(TOKENS)))
            thread.start()
            thread.join()
        assert torch.equal(found[0], exact)

    def test_is_of_integers(self):
        """Products of activations, and rows of what is no embedding."""
        model = sited_model("gpt2")
        x, y = normal(2, 5, 5), normal(2, 5, 5, seed=1)
        with lf.integer_arithmetic(model, 4):
            assert torch.equal(x @ y, torch.matmul(x, y))
            found, row = x @ y, x[0]
            attended = F.scaled_dot_product_attention(x, y, y)
        assert torch.equal(found, x @ y)
        assert torch.equal(row, x[0])
        assert torch.equal(attended, F.scaled_dot_product_attention(x, y, y))

    def test_is_hidden(self):
        """An activation that is not finite makes all logits so."""
        model = sited_model("gpt2")
        with torch.no_grad():
            model.W_E[3, 1] = torch.inf
        with lf.integer_arithmetic(model, 8):
            assert model(TOKENS).isnan().all()

    def test_shares_a_product_of_norms_that_are_one_map(self):
        counted = lf.integer_operations(sited_model("gpt2"), TOKENS).counts
        split = sited_model("gpt2")
        lf.freeze_site(split, "blocks.0.ln1.v", 1.1)
        more = lf.integer_operations(split, TOKENS).counts
        kind = "products, norms and scalers"
        assert more[kind] - counted[kind] == TOKENS.numel() * 32


class TestRefusals:
    def test_of_stock_norms_says_what_to_call(self):
        model = live_model("gpt2")
        with (
            pytest.raises(UnsupportedModelError, match=r"with_norm_sites\(model\) first"),
            lf.integer_arithmetic(model, 8),
        ):
            pass

    @pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in", "use_attn_result"])
    def test_of_heads_one_by_one(self, flag):
        model = sited_model("gpt2")
        getattr(model, f"set_{flag}")(True)
        with (
            pytest.raises(UnsupportedModelError, match=f"model.set_{flag}\\(False\\)"),
            lf.integer_arithmetic(model, 8),
        ):
            pass

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
    def test_of_compiled_models(self):
        model = sited_model("gpt2")
        model.blocks[1].compile()
        with (
            pytest.raises(UnsupportedModelError, match=r"blocks\.1 is compiled"),
            lf.integer_arithmetic(model, 8),
        ):
            pass

    def test_of_single_gradients(self):
        model = sited_model("gpt2", n_layer=1)
        with (
            pytest.raises(UnsupportedModelError, match=r"torch\.func"),
            lf.integer_arithmetic(model, 8),
        ):
            lf.fisher_information(model, TOKENS, progress=False)

    @pytest.mark.parametrize("more", [{"padding_idx": 0}, {"max_norm": 1.0}, {"sparse": True}])
    def test_of_unusual_embeddings(self, more):
        model = sited_model("gpt2")
        with (
            pytest.raises(UnsupportedModelError, match="padding index"),
            lf.integer_arithmetic(model, 8),
        ):
            F.embedding(TOKENS, model.W_E.detach().clone(), **more)

    def test_of_sums_with_factors(self):
        x = normal(3, 3)
        with (
            pytest.raises(UnsupportedModelError, match="addmm with beta"),
            lf.integer_arithmetic(sited_model("gpt2"), 8),
        ):
            torch.addmm(x, x, x, beta=2)

    def test_of_widths(self):
        with (
            pytest.raises(DataError, match="integers of 32 bits"),
            lf.integer_arithmetic(sited_model("gpt2"), 32),
        ):
            pass

    def test_of_tokens(self):
        with pytest.raises(DataError, match="token ids go from"):
            lf.integer_operations(sited_model("gpt2"), TOKENS + 1000)


def test_the_table_says_how_many_for_each_token():
    shown = str(lf.integer_operations(sited_model("gpt2"), TOKENS))
    assert "integers of 8 bits" in shown
    assert "square roots, norms" in shown
    assert " 7.0" in shown  # two norms in each of three blocks, and the last
