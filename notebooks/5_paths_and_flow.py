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
# Given the attention patterns, a logit is a sum over paths: a source at its position, and the heads
# that carried it to the last position. There are about (1 + heads) ** layers ways, so the largest
# are opened first, and what stays closed keeps its exact value.

# %%
import lnfree_interp as lf

lf.plots.show_in_notebooks()

free = lf.load("../lnfree-demo/model")
prompt = "class Stack:\n    def push(self, item):\n        self.items.append("
trace = lf.trace(free, prompt)
target = lf.LogitDifference("item", "self")

# %%
paths = lf.expand_paths(trace, target, top_k=20).verify()
print(paths)
paths.top(8)

# %%
lf.plots.paths(paths)

# %% [markdown]
# The largest path starts at block 0's MLP, at the position of the argument, and goes through L3H4:
# the MLP says which token it is, the head moves it to the end.

# %%
at = trace.prompts[0].index(" item")
assert paths.labels[0] == f"0_mlp_out@{at} > L3H4"

# %% [markdown]
# Is it needed? Take away what the head reads at the argument, and nothing else. *Predicted* is the
# sum over the paths that pass there; *direct* is measured where the target reads, and *total* with
# everything that the model makes of it.

# %%
lf.ablate(trace, [f"L3H4@{at}"]).compare(target).verify().to_frame().round(3)

# %% [markdown]
# ## Flow
#
# With neuron gates given as well, everything flows from tokens and biases to the logit: at every
# node, what enters (its own biases among it) is what leaves. Nodes that are not shown are counted
# at each node, and at the end: here they carry about half.

# %%
graph = lf.flow_graph(trace, target, top_k=25).verify()
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
