"""LayerNorm -> RMSNorm -> CRMSNorm: exact, and each check fails when a step is left out."""

from dataclasses import replace

import pytest
import torch
from support.architectures import make_model
from transformer_lens import HookedTransformer

import lnfree_interp as lf
from lnfree_interp.errors import InexactError, UnsupportedModelError
from lnfree_interp.models import folding
from lnfree_interp.models.folding import is_reader
from lnfree_interp.models.norms import CRMSNormPre
from lnfree_interp.variants import rms as norm_conversions

GATE = {torch.float64: 1e-12, torch.float32: 1e-5}
KINDS = ["gpt2", "neo", "opt", "neox", "neox-sequential"]


@pytest.fixture(params=KINDS)
def live_model(request, dtype):
    return lf.load(make_model(request.param).to(dtype), dtype=dtype)


def loud(model, token=5, size=3000.0):
    """One token with a residual of that size, as position 0 of GPT-2 has."""
    with torch.no_grad():
        row = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(2))
        model.embed.W_E[token] = (row * size / row.norm()).to(model.W_E.dtype)
    return model


def require_exact(conversion, model, dtype):
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    tokens[:, ::3] = 5
    for some in (tokens, None):
        error = lf.compare_logits(conversion.model, model, some)
        assert error.relative <= GATE[dtype]
    assert conversion.error.relative <= GATE[dtype]


def test_rms_is_exact_and_stock(live_model, dtype):
    model = loud(live_model)
    conversion = lf.to_rms(model)
    require_exact(conversion, model, dtype)
    assert type(conversion.model) is HookedTransformer
    assert conversion.model.cfg.normalization_type == "RMSPre"
    assert conversion.model.cfg.eps == model.cfg.eps
    assert "centred the weights that write" in str(conversion)
    assert conversion.parameters[1] < conversion.parameters[0]


@pytest.mark.parametrize("basis", ["orthonormal", "drop"])
def test_crms_is_exact(basis, live_model, dtype):
    model = loud(live_model)
    rms = lf.to_rms(model).model
    for source in (model, rms):
        conversion = lf.to_crms(source, basis)
        require_exact(conversion, model, dtype)
        assert conversion.d_model == (32, 31)
        assert conversion.model.W_E.shape == (300, 31)
    norms = [m for m in conversion.model.modules() if isinstance(m, CRMSNormPre)]
    assert len(norms) == (7 if basis == "drop" else 0)


def test_the_orthonormal_basis_keeps_lengths_and_angles(live_model, tokens):
    rms = lf.to_rms(live_model).model
    narrow = lf.to_crms(rms).model
    _, wide_cache = rms.run_with_cache(tokens)
    _, cache = narrow.run_with_cache(tokens)
    for a, b in ((cache["resid_post", i], wide_cache["resid_post", i]) for i in range(3)):
        gram = [x[0] @ x[0].T for x in (a, b)]
        lf.numerics.measure_error(*gram).require("Gram matrix", 1e-5)


@pytest.mark.parametrize("forgotten", ["W_E", "W_pos", "W_O", "b_O", "W_out", "b_out"])
def test_a_writer_that_is_not_centred_is_caught(forgotten, dtype, monkeypatch):
    model = lf.load(make_model("gpt2").to(dtype), dtype=dtype)
    writers = tuple(name for name in folding.WRITERS if name != forgotten)
    monkeypatch.setattr(folding, "WRITERS", writers)
    with pytest.raises(InexactError, match="Pre-RMSNorm against the model before"):
        lf.to_rms(model)


# Dropping the last coordinate of a writer *is* the conversion, so only readers can be forgotten.
FORGOTTEN = [(basis, W) for basis in ("orthonormal", "drop") for W in ("W_Q", "W_V", "W_in", "W_U")]
FORGOTTEN += [("orthonormal", W) for W in ("W_E", "b_O", "W_out")]


@pytest.mark.parametrize(("basis", "forgotten"), FORGOTTEN)
def test_a_weight_left_in_the_old_basis_is_caught(basis, forgotten, dtype, monkeypatch):
    model = lf.to_rms(lf.load(make_model("gpt2").to(dtype), dtype=dtype)).model
    right = {"orthonormal": norm_conversions._orthonormal, "drop": norm_conversions._dropping}[
        basis
    ]
    shapes = {W.shape for name, W in model.named_parameters() if name.endswith(forgotten)}

    def crooked(*size):
        """Cuts weights of one shape to size instead of converting them."""

        def careless(convert, reads):
            def converted(W):
                shape = W.transpose(-1, -2).shape if reads else W.shape
                return W[..., :-1] if shape in shapes else convert(W)

            return converted

        writer, reader = right(*size)
        if is_reader(forgotten):
            return writer, careless(reader, reads=True)
        return careless(writer, reads=False), reader

    monkeypatch.setattr(norm_conversions, right.__name__, crooked)
    with pytest.raises(InexactError, match="CRMSNorm"):
        lf.to_crms(model, basis)


def test_a_wrong_epsilon_is_caught(dtype, monkeypatch):
    hf_model = make_model("gpt2", layer_norm_epsilon=0.5).to(dtype)
    model = lf.load(hf_model, dtype=dtype)
    right = norm_conversions.hooked_transformer

    def wrong(cfg, *args, **kwargs):
        return right(replace(cfg, eps=cfg.eps * 1.1), *args, **kwargs)

    monkeypatch.setattr(norm_conversions, "hooked_transformer", wrong)
    with pytest.raises(InexactError):
        lf.to_rms(model)


def test_what_cannot_be_converted_is_refused(folded):
    llama = lf.load(make_model("llama"))
    with pytest.raises(UnsupportedModelError, match="'RMS'"):
        lf.to_rms(llama)
    with pytest.raises(UnsupportedModelError, match="folded gains"):
        lf.to_crms(llama)
    with pytest.raises(UnsupportedModelError, match="normalization_type=None"):
        lf.to_rms(folded)
    gemma = lf.load(make_model("gemma2"))
    with pytest.raises(UnsupportedModelError, match="after the sublayers"):
        lf.to_rms(gemma)


def test_a_stream_with_a_mean_has_no_room_in_crms():
    """What a model trained with RMSNorm is, once its gains are folded."""
    rms = lf.to_rms(lf.load(make_model("gpt2"))).model
    with torch.no_grad():
        rms.blocks[1].attn.b_O.add_(0.5)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn\.b_O writes a mean"):
        lf.to_crms(rms)


def test_half_precision_converts(tokens):
    model = lf.load(make_model("gpt2"), dtype=torch.bfloat16, check=False)
    assert lf.to_rms(model).model.W_E.dtype == torch.bfloat16
