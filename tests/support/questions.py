"""Every question of the public interface that one prompt can be asked, by name."""

import torch

import lnfree_interp as lf

QUESTIONS = {
    **{
        f"logits by {by}": lambda *of, by=by: lf.attribute_logits(*of, 3, 5, by=by)
        for by in ("layer", "sublayer", "head", "source", "neuron")
    },
    "biases": lambda *of: lf.attribute_logits(*of, 3, by="head", biases=True),
    "several answers": lambda *of: lf.attribute_logits(*of, [3, 4, 5]),
    "next tokens": lambda *of: lf.attribute_next_tokens(*of),
    "attribute": lambda *of: lf.attribute(*of, lf.LogitDifference(3, 5)),
    "scores": lambda *of: lf.attribute_scores(*of, 2, 1, query=3),
    "scores by source": lambda *of: lf.attribute_scores(*of, 1, 1, keys=[0, 2], by="source"),
    "score of a query": lambda *of: lf.attribute(*of, lf.Score(2, 1, key=1, side="query")),
    "log-odds": lambda *of: lf.attribute(*of, lf.LogOdds(2, 1, key=1, other=2, side="key")),
    "neuron": lambda *of: lf.attribute_neuron(*of, 1, 7, of="post"),
    "residual": lambda *of: lf.decompose_residual(*of, "blocks.1.hook_resid_mid"),
    "probe": lambda *of: lf.attribute(*of, lf.Probe(torch.arange(32), pos=slice(None))),
    "mean of a probe": lambda *of: lf.attribute(
        *of, lf.Probe(torch.arange(32), pos=slice(1, 3), mean=True)
    ),
    "probe behind a norm": lambda *of: lf.attribute(
        *of, lf.Probe(torch.arange(32), "ln_final", slice(0, 2), mean=True)
    ),
    "affine": lambda *of: lf.affine_map(*of, 3, 5),
    "paths": lambda *of: lf.expand_paths(*of, 3, 5),
    "paths by source": lambda *of: lf.expand_paths(*of, 3, 5, by="source"),
    "flow": lambda *of: lf.flow_graph(*of, 3, 5),
    "flow by neuron": lambda *of: lf.flow_graph(*of, 3, 5, by="neuron"),
    "flow by source": lambda *of: lf.flow_graph(*of, 3, 5, by="source"),
    "flow by sublayer": lambda *of: lf.flow_graph(*of, 3, 5, by="sublayer"),
    "lens": lambda *of: lf.logit_lens(*of),
    "flips": lambda *of: lf.flip_distances(*of, 1, "L0H1"),
}
