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
# # Paths and flow
#
# Given the attention patterns, a logit is a sum over paths: a source, and the heads that carried it
# to the last position. There are about (1 + heads) ** layers of them, so the largest are opened
# first, and what stays closed keeps its exact value.

# %%
import lnfree_interp as lf

lf.plots.show_in_notebooks()

free = lf.load("../lnfree-demo/model")
prompt = "class Stack:\n    def push(self, item):\n        self.items.append("
question = (free, prompt, "item", "self")

# %%
paths = lf.expand_paths(*question, top_k=20).verify()
print(paths)
paths.top(8)

# %%
lf.plots.paths(paths)

# %% [markdown]
# The largest path goes through block 0's MLP and then through L3H4. A path sums over positions;
# where does this one start?

# %%
_, cache = free.run_with_cache(prompt)
pattern = cache["pattern", 3][0, 4, -1]
reading = free.W_U[:, free.to_single_token("item")] - free.W_U[:, free.to_single_token("self")]
at = pattern * (cache["mlp_out", 0][0] @ free.W_V[3, 4] @ free.W_O[3, 4] @ reading).detach()
words = free.to_str_tokens(prompt)
assert abs(at.sum() - paths["0_mlp_out > L3H4"]) < 1e-3
print(*(f"{words[i]!r} at {i}: {at[i]:+.2f}" for i in at.abs().topk(3).indices.tolist()), sep="\n")

# %% [markdown]
# At the argument: the MLP says which token it is, the head moves it to the end.
#
# ## Flow
#
# With neuron gates held as well, everything flows from tokens and biases to the logit: at every
# node, what enters (its own biases among it) is what leaves. Nodes that are not shown are counted
# at each node, and at the end: here they carry about half.

# %%
graph = lf.flow_graph(*question, top_k=25).verify()
print(graph)
lf.plots.flow(graph)

# %%
node = max((n for n in graph.nodes if n.kind == "head"), key=lambda n: abs(n.flow))
print(node)

# %% [markdown]
# For your own tools: `graph.to_json()`, or a networkx graph.

# %%
nx_graph = graph.to_networkx()
edges = sorted(nx_graph.edges(data="flow"), key=lambda edge: -abs(edge[2]))
for source, target, flow in edges[:6]:
    print(f"{source:14} -> {target:14} {flow:+.2f}")
