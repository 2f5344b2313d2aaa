# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First steps
#
# In a transformer without LayerNorm every sublayer reads the residual stream by an affine map, so a
# logit is a sum of parts, exact up to rounding. This notebook loads such a model, asks it for a
# logit, and checks the sum.
#
# It uses the model that `make demo` wrote: a 4-layer GPT-2 that was trained on Python's standard
# library, with its norms removed. `lf.load` takes a hub id in the same place, such as
# `schaeff/gpt2-small_LNFree300`.

# %%
import lnfree_interp as lf

lf.plots.show_in_notebooks()  # a picture beside each figure, for places without JavaScript

free = lf.load("../lnfree-demo/model")
print(f"{free.cfg.n_layers} layers, {free.cfg.n_heads} heads, norms: {free.cfg.normalization_type}")

# %% [markdown]
# It is a stock `HookedTransformer`: everything that you know from TransformerLens works.

# %%
logits, cache = free.run_with_cache("for i in")
top = logits[0, -1].topk(5)
for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True):
    print(f"{free.to_string([token])!r:12} {value:.2f}")

# %% [markdown]
# A *trace* is one forward pass; all questions about the prompt are asked of it. A *target* says
# what is explained: why ` range`, and not ` self`? A *level* says by which parts: here by sublayer,
# each attention and each MLP, from zero to the logit.

# %%
trace = lf.trace(free, "for i in")
target = lf.LogitDifference(" range", " self")
dla = trace.attribute(target, by="sublayer")
dla.verify()  # raises if the parts do not make the logit
lf.plots.attribution(dla)

# %% [markdown]
# The result is a labelled sum. It has the total that the model itself computed, and knows how far
# its parts are from it.

# %%
print(dla)
print(dla.certificate)
dla.top(5)

# %% [markdown]
# The same by head, on the same trace. `lf.attribute_logits(free, "for i in", " range", " self")` is
# the short form. What is not a head is named under the title.

# %%
by_head = trace.attribute(target, by="head").verify()
lf.plots.attribution(by_head)

# %% [markdown]
# Is it true? Take a head out, let the model run on, and compare: predicted by the sum, measured
# where the target reads, and in all, with everything that the later parts make of it.

# %%
largest = by_head.of_kind("head").abs().argmax()
head = [component for component in by_head.components if component.kind == "head"][largest]
lf.ablate(trace, head).compare(target).verify().to_frame().round(4)

# %% [markdown]
# ## What this is worth
#
# With its norms, the original can be taken apart too, if the last norm's scale is held at the value
# it had. The parts then add up as well. But take one away, and the logit changes by another amount:
# the gap is the largest miss among the four largest parts, relative to the largest measured loss.
# The result says so itself.

# %%
live = lf.load(lf.bundled_checkpoint())
held = lf.trace(live, "for i in", hold=True).attribute(target, by="head")
print("original:", held)
print("LN-free: ", by_head)
assert held.gap is not None
assert by_head.gap is None

# %% [markdown]
# Every identity that the analyses rest on, checked on this model:

# %%
lf.certificate_table(lf.certify(trace))[["identity", "relative", "holds"]]
