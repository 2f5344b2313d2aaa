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
# In a transformer without LayerNorm everything reads the residual stream by an affine map, so a
# logit is a sum of parts: not roughly, but to rounding. This notebook loads such a model, asks it
# for a logit, and checks the sum.
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
# Why ` range`, and not ` self`? Every block's share of the difference, from nothing to the logit:

# %%
dla = lf.attribute_logits(free, "for i in", " range", against=" self", by="block")
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
# The same by head; what is not a head is named under the title.

# %%
lf.plots.attribution(lf.attribute_logits(free, "for i in", " range", " self", by="head").verify())

# %% [markdown]
# ## What this is worth
#
# With its norms, the original can be taken apart too, if the last norm's scale is held at the value
# it had. The parts then add up as well. But take one away, and the logit changes by another amount:
# `gap` is the largest miss among the four largest parts, relative to the largest measured loss.

# %%
live = lf.load(lf.bundled_checkpoint())
held = lf.attribute_logits(live, "for i in", " range", " self", frozen_scale=True)
print("original:", held.error, "| gap", held.gap)
print("LN-free: ", dla.error, "| nothing is held")

# %% [markdown]
# Every identity that the analyses rest on, checked on this model:

# %%
lf.certificate_table(lf.certify(free))[["identity", "relative", "holds"]]
