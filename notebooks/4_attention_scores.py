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
# # Attention scores and counterfactual patterns
#
# A score before the softmax is bilinear: what is at the query times what is at the key, part by
# part. The softmax is not additive, but its log-odds between two keys are, and what the pattern
# would be without a part is a formula.

# %%
import lnfree_interp as lf

lf.plots.show_in_notebooks()

free = lf.load("../lnfree-demo/model")
prompt = "class Stack:\n    def push(self, item):\n        self.items.append("
trace = lf.trace(free, prompt)
tokens = trace.prompts[0]
item = tokens.index(" item")

# %% [markdown]
# Why does L3H4 look from the end of the prompt to the argument? Its score, by pairs of components:

# %%
scores = lf.attribute_scores(trace, layer=3, head=4).verify()
print(scores)
print(f"attention to {tokens[item]!r}: {scores.log_pattern.exp()[item]:.2f}")
lf.plots.scores(scores, key=item)

# %%
scores.top(key=item, k=5)

# %% [markdown]
# Why there rather than to the first `self`? The logarithm of the two weights' ratio is a sum over
# what is at the query; or over what is at the two keys.

# %%
odds = scores.log_odds(item, tokens.index("self")).verify()
print(f"{odds.total.item():.2f} = log of the ratio of the two attention weights")
odds.top(5)

# %%
self_at = tokens.index("self")
trace.attribute(lf.LogOdds(3, 4, key=item, other=self_at, side="key")).verify().top(5)

# %% [markdown]
# ## Without a component
#
# The pattern that the head would have if it could not see what block 0's MLP wrote. The closed form
# is compared with a run in which that was taken out.

# %%
without = lf.counterfactual_pattern(trace, 3, 4, without="0_mlp_out").verify()
print(without)
lf.plots.pattern(without)

# %% [markdown]
# Is that at the query, or at the key?

# %%
for side in ("query", "key"):
    one = lf.counterfactual_pattern(trace, 3, 4, "0_mlp_out", side=side).verify()
    print(f"missing at the {side:5}: attention to {tokens[item]!r} {one.pattern[-1, item]:.2f}")

# %% [markdown]
# Hover over it in a notebook (circuitsvis; nothing is fetched from the network):
# `lf.plots.circuits.heads(without)`.
