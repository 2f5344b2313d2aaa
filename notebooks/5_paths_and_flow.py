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
# The largest path goes through block 0's MLP at the argument, and then through L3H4: the MLP says
# which token it is, the head moves it to the end.
#
# ## Flow
#
# With neuron gates held as well, everything flows from tokens to the logit, and no node makes or
# loses any: what enters is what leaves. Nodes that are not shown are counted at each node.

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
