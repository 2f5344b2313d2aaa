"""Fisher information: closed forms, brute force, streams and subsets."""

import weakref
from dataclasses import replace

import pytest
import torch
from support.architectures import ALL
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.errors import DataError, RecipeError
from lnfree_interp.models.running import run
from lnfree_interp.tuning.selection import parameters_of

TEXT = torch.randint(30, (6, 9), generator=torch.Generator().manual_seed(3))


SMALL = TEXT % 13


def small():
    return live_model("gpt2", n_layer=1, vocab_size=13)


def fisher_of(model, text=TEXT, **options):
    return lf.fisher_information(model, text, progress=False, **options)


def by_hand(model, kind, text=TEXT):
    """Sequence by sequence, and label by label for the model's own."""
    sited = lf.with_norm_sites(model)
    places, n = parameters_of(sited), text[:, 1:].numel()
    sums = {name: torch.zeros_like(W) for name, W in places.items()}
    for row in text:
        log_probs = run(sited, row[None])[0, :-1].log_softmax(-1)
        if kind == "empirical":
            scores = [(1.0, log_probs[torch.arange(len(row) - 1), row[1:]].sum())]
        else:
            scores = [(p.exp().item(), p) for p in log_probs.flatten()]
        for weight, score in scores:
            grads = torch.autograd.grad(
                score, list(places.values()), retain_graph=True, allow_unused=True
            )
            for name, g in zip(places, grads, strict=True):
                sums[name] += 0 if g is None else weight * g**2 / n
    return {name: W.detach() for name, W in sums.items()}


def assert_same(found, expected, tolerance=1e-12):
    largest = max(W.max() for W in expected.values())
    for name, W in expected.items():
        error = (found.get(name, torch.zeros_like(W)) - W).abs().max()
        assert error <= tolerance * largest, name


class TestValues:
    @ALL
    def test_empirical_by_brute_force(self, kind):
        model = live_model(kind)
        text = TEXT % model.cfg.d_vocab
        assert_same(fisher_of(model, text).values, by_hand(model, "empirical", text))

    def test_of_the_model_by_brute_force(self):
        text = SMALL[:2, :5]
        found = fisher_of(small(), text, kind="model", draws="all", batch=7)
        assert_same(found.values, by_hand(small(), "model", text))

    def test_of_curves(self):
        dyt = lf.to_dyt(small(), tokens=SMALL).model
        options = {"trainable": "norms:ln_final", "batch": 60}
        found = fisher_of(dyt, SMALL, kind="model", draws="all", **options).values
        drawn = fisher_of(dyt, SMALL, kind="model", draws=100, **options).values
        for name, W in found.items():
            assert (drawn[name].sum() / W.sum() - 1).abs() < 0.4, name

    def test_a_softmax_of_a_linear_map_in_closed_form(self):
        """E[x_i^2 p_k (1 - p_k)] for the unembedding, which no layer comes after."""
        model = live_model("neox", num_hidden_layers=1, vocab_size=13)
        assert not torch.equal(model.W_U, model.W_E.T)
        options = {"trainable": "unembed", "batch": 60}
        found = fisher_of(model, SMALL, kind="model", draws="all", **options)
        logits, cache = model.run_with_cache(SMALL)
        x, p = model.ln_final(cache["resid_post", -1])[:, :-1], logits[:, :-1].softmax(-1)
        expected = torch.einsum("spi,spk->ik", x**2, p * (1 - p)) / SMALL[:, 1:].numel()
        error = (found.values["unembed.W_U"] - expected).abs().max() / expected.max()
        assert error <= 1e-12

    def test_draws_are_near_what_they_are_drawn_from(self):
        model, text = small(), SMALL[:3]
        exact = fisher_of(model, text, kind="model", draws="all", trainable="norms", batch=60)
        drawn = fisher_of(model, text, kind="model", draws=200, trainable="norms")
        other = fisher_of(model, text, kind="model", draws=200, trainable="norms", seed=1)
        again = fisher_of(model, text, kind="model", draws=200, trainable="norms")
        whole = torch.cat(list(exact.values.values()))
        for found in (drawn, other):
            values = torch.cat(list(found.values.values()))
            # 600 scores of 8 draws each: their mean square is off by some sqrt(2 / 600).
            assert ((values - whole) / whole).abs().median() < 0.1
            assert (values.sum() / whole.sum() - 1).abs() < 0.15
        assert not torch.equal(drawn.values["ln_final.w"], other.values["ln_final.w"])
        assert torch.equal(drawn.values["ln_final.w"], again.values["ln_final.w"])


class TestStream:
    @pytest.mark.parametrize("options", [{}, {"kind": "model", "draws": "all"}])
    def test_is_the_same_in_one_pass(self, options):
        model = small()
        whole = fisher_of(model, SMALL, batch=1000, **options)
        for batch in (5, 17):
            assert_same(fisher_of(model, SMALL, batch=batch, **options).values, whole.values)

    def test_is_flat_in_memory(self):
        """What is alive at once does not grow with the text."""
        model = live_model("gpt2", torch.float32, n_layer=1)
        text = torch.randint(300, (10_240 // 32, 32), generator=torch.Generator().manual_seed(0))
        peaks = []
        for some in (text[:32], text):
            alive = _Alive()
            with alive:
                fisher_of(model, some)
            peaks.append(alive.peak)
        assert peaks[0] > 4 * 4 * sum(W.numel() for W in model.parameters())  # four gradients
        assert peaks[1] <= 1.01 * peaks[0]

    def test_leaves_the_model_as_it_is(self):
        model = live_model("gpt2")
        before = {name: W.clone() for name, W in model.state_dict().items()}
        fisher_of(model)
        assert all(torch.equal(W, before[name]) for name, W in model.state_dict().items())
        assert all(W.grad is None and W.requires_grad for W in model.parameters())


class _Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of results that were alive at once, among what operators return."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self._see(x)
        return out

    def _see(self, x):
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.now -= self.known.pop(key, 0)

        weakref.finalize(x, gone)


class TestSubset:
    def test_has_the_most_of_it(self):
        model = live_model("gpt2")
        fisher = fisher_of(model, trainable="norms")
        mask = lf.fisher_subset(fisher, 0.2)
        assert mask.count == round(0.2 * fisher.mask.count)
        values = torch.cat([W.flatten() for W in fisher.values.values()])
        chosen = torch.cat([
            mask.chosen.get(name, torch.zeros(W.shape, dtype=torch.bool)).flatten()
            for name, W in fisher.values.items()
        ])  # fmt: skip
        assert values[chosen].min() >= values[~chosen].max()
        among = lf.select_parameters(model, "norms:ln2")
        assert (lf.fisher_subset(fisher, 0.5, among=among) | among) == among

    def test_is_trained(self):
        model = live_model("gpt2", torch.float32)
        mask = lf.fisher_subset(fisher_of(model, trainable=("norms", "L0H1")), 0.3)
        recipe = replace(lf.recipes.finetuning(steps=2, batch=2), trainable=mask)
        run = lf.finetune(model, recipe, TEXT, progress=False)
        change = lf.component_change(model, run.model).to_frame().set_index("component")
        moved = set(change.index[change.largest > 0])
        allowed = set(fisher_of(model, trainable=("norms", "L0H1")).to_frame().component)
        assert moved
        assert moved <= allowed

    def test_ranks_components(self):
        model = live_model("gpt2")
        fisher = fisher_of(model, trainable=("norms", "L0H1"))
        frame = fisher.to_frame().set_index("component")
        assert set(frame.index) == {"L0H1", "ln_final"} | {
            f"blocks.{n}.{ln}" for n in range(3) for ln in ("ln1", "ln2")
        }
        W = fisher.values["blocks.1.ln2.w"], fisher.values["blocks.1.ln2.b"]
        assert frame.loc["blocks.1.ln2", "total"] == pytest.approx(sum(x.sum().item() for x in W))
        head = sum(x[1].sum().item() for n, x in fisher.values.items() if ".attn." in n)
        assert frame.loc["L0H1", "total"] == pytest.approx(head)
        assert fisher.top(1).component[0] == frame["mean"].idxmax()
        assert fisher.top(1).component[0] in repr(fisher)


class TestWrong:
    def test_inputs_are_refused(self):
        model = live_model("gpt2")
        fisher = fisher_of(model, trainable="norms")
        for error, message, call in (
            (DataError, "kind='other'", lambda: fisher_of(model, kind="other")),
            (DataError, "draws=0", lambda: fisher_of(model, kind="model", draws=0)),
            (DataError, "batch=0", lambda: fisher_of(model, batch=0)),
            (RecipeError, "no component 'nroms'", lambda: fisher_of(model, trainable="nroms")),
            (RecipeError, "share must lie", lambda: lf.fisher_subset(fisher, 0.0)),
            (RecipeError, "were not measured", lambda: lf.fisher_subset(
                fisher, 0.5, among=lf.select_parameters(model, "biases"))),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                call()


def test_the_figure_has_the_mean_of_every_kind_in_every_layer():
    model = live_model("gpt2")
    tokens = torch.randint(300, (4, 8), generator=torch.Generator().manual_seed(0))
    fisher = lf.fisher_information(model, tokens, progress=False)
    figure = lf.plots.fisher_information({"one": fisher, "two": fisher})
    panels = [note.text for note in figure.layout.annotations]
    frame = fisher.to_frame()
    inside = frame[frame["layer"].notna()]
    assert panels == list(dict.fromkeys(inside["kind"]))
    assert len(figure.data) == 2 * len(panels)
    heads = inside[(inside["kind"] == "head") & (inside["layer"] == 1)]
    line = figure.data[2 * panels.index("head")]
    mean = heads["total"].sum() / heads["parameters"].sum()
    assert line.y[list(line.x).index(1)] == pytest.approx(mean)
    shown = figure.layout.title.subtitle.text
    assert all(name in shown for name in frame[frame["layer"].isna()]["component"])
    assert "squared nats" in shown
    embed = lf.fisher_information(model, tokens, trainable="embed", progress=False)
    with pytest.raises(DataError, match="nothing to draw"):
        lf.plots.fisher_information(embed)
