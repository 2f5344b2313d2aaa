"""A regression on words of a real model: planted in its stream, found there, taken apart."""

import pytest

import lnfree_interp as lf
from lnfree_interp.errors import InexactError

pytestmark = pytest.mark.smollm2
SITE = "blocks.4.hook_resid_post"


def test_planted_targets_are_found_and_taken_apart(smollm2):
    data = lf.planted_reading_times(smollm2, SITE, pool="mean", noise=0.1, sentences=100)
    sites = [SITE, "blocks.0.hook_resid_pre", "blocks.4.ln2"]
    fits = lf.fit_probes(
        smollm2, data.targets, words=data.words, sites=sites, pool="mean", folds=3, progress=False
    )
    fitted, r2 = fits[SITE], {site: one.r2["stream"].mean() for site, one in fits.items()}
    assert r2[SITE] > 0.8
    assert r2[SITE] > r2["blocks.0.hook_resid_pre"] + 0.1
    assert (fitted.mae["ensemble"] < fitted.mae["mean"]).all()
    sentence = lf.Sentence(["It", "was", "an", "extraordinarily", "quiet", "10\u00a0km", "☃️."])
    trace = lf.trace(smollm2, sentence.text)
    said = fitted.predict([sentence], "stream")
    for word in (3, 5, 6):
        target = fitted.target("planted_TRT", sentence, word)
        for by in ("head", "neuron", "source"):
            found = trace.attribute(target, by=by).verify()
            assert found.total.item() == pytest.approx(said["planted_TRT"][word], rel=1e-4)
    with pytest.raises(InexactError, match=r"^blocks\.4\.ln2 is not affine"):
        trace.attribute(fits["blocks.4.ln2"].target("planted_TRT", sentence, 3))
