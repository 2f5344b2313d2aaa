"""How users write it: `make types` runs pyright over this file; it is never executed."""

from typing import assert_type

import plotly.graph_objects as go
import torch
from transformer_lens import HookedTransformer

import lnfree_interp as lf

model = lf.load("gpt2", dtype=torch.float64)
assert_type(model, HookedTransformer)
lf.load(lf.smollm2())
data = lf.pack(lf.stdlib_corpus("train"), model.tokenizer, sequence_length=128)
recipe = lf.recipes.distilled(model, steps=10)
run = lf.remove_norms(model, recipe, data, fwd_hooks=[("blocks.0.hook_mlp_out", print)])
free = lf.fold(run.model)
dla = lf.attribute_logits(free, "a", " b", " c", by="head").verify()
assert_type(dla, lf.Contributions)
lf.attribute_logits(free, ["a", "b"], [" b", " c"])
lf.attribute_logits(free, torch.arange(3), 5)
lf.attribute_logits(free, [1, 2, 3], [4, 5])
assert_type(dla["L0H1"], torch.Tensor)
frame = dla.top(5)
scores = lf.attribute_scores(free, "a", 0, 1, keys=[0]).verify()
scores.by_query().top(3)
scores["L0H1", "embed"]
assert_type(lf.plots.attribution(dla), go.Figure)
lf.plots.scores(scores)
lf.plots.pattern(lf.counterfactual_pattern(free, "a", 1, 0, without="L0H0"))
lf.plots.flow(lf.flow_graph(free, "a", "b", top_k=None, by="neuron"))
lf.plots.paths(lf.expand_paths(free, "a", "b"))
lf.plots.attribution(lf.affine_map(free, "a", "b").verify())
evaluation = lf.evaluate({"a": model, "b": free}, data, original="a")
lf.plots.residual_norms(evaluation)
lf.plots.direct_effects(evaluation)
lf.plots.direct_effects(lf.direct_effects(free, data))
check = lf.deletion_check(free, ["a b c"], ["L0H1"], k=[1, 4], answers=" b", foils=" c")
assert_type(check.verify(), lf.DeletionCheck)
check.summary(["kind"])
assert_type(lf.plots.deletions(check), go.Figure)
lf.plots.training_curve(run)
assert_type(lf.patch_residual(free, *lf.ioi_pairs(model)).error, float)
evaluation.to_frame()
trace = lf.trace(free, "a")
assert_type(trace, lf.Trace)
assert_type(lf.attribute_logits(trace, " b", " c").verify(), lf.Contributions)
lf.attribute(trace, lf.LogitDifference(" b", " c"), by="sublayer")
lf.attribute(free, "a", lf.Neuron(0, 1))
lf.ablate(trace, ["L0H1"], with_="mean").compare(lf.Logit(" b")).top(3)
(dla - dla).save("difference.safetensors")
lf.certificate_table(lf.certify(free))
lf.gauge_check(lambda m: m.W_E.norm(), free)
lf.ov_table(free, 0, 1).top(5)
lf.virtual_weights(free, "L0H0", "L1H0", "Q").norm()
lf.export(run.model, "out", recipe=recipe)
