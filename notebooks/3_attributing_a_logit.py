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
# # Attributing a logit, end to end
#
# One logit difference on one trace, taken apart by head, source token, neuron and input token. Each
# is one call, each is exact, and each result says what it is a sum of.

# %%
import lnfree_interp as lf

lf.plots.show_in_notebooks()

free = lf.load("../lnfree-demo/model")
prompt = "class Stack:\n    def push(self, item):\n        self.items.append("
trace = lf.trace(free, prompt)
target = lf.LogitDifference("item", "self")

# %% [markdown]
# By head. One of them stands out.

# %%
by_head = trace.attribute(target, by="head").verify()
lf.plots.attribution(by_head)

# %% [markdown]
# By head and the token that it reads: it copies from the argument's name.

# %%
by_source = trace.attribute(target, by="source").verify()
print(by_source.top(5))
lf.plots.attribution(by_source)

# %% [markdown]
# By neuron: thousands of parts, most of which cancel. The largest are shown, the others as one bar.

# %%
by_neuron = trace.attribute(target, by="neuron").verify()
print(by_neuron)
neurons = by_neuron.of_kind("neuron")
largest = neurons.abs().sort(descending=True).values
needed = int((largest.cumsum(0) < largest.sum() / 2).sum()) + 1
print(
    f"{len(neurons)} neurons add {neurons.sum():+.2f}, but {largest.sum():.1f} in absolute value;"
)
print(f"{needed} of them make half of that")
lf.plots.attribution(by_neuron)

# %% [markdown]
# By input token, through the whole network, attention patterns and neuron gates given. No norm is
# held, since there is none. Biases belong to no token: they stand apart.

# %%
tokens = lf.affine_map(trace, target).verify()
print(tokens)
lf.plots.attribution(tokens)

# %% [markdown]
# ## Over many prompts
#
# Prompts need not be equally long, and each has its own answer.

# %%
names = ["item", "name", "value", "key", "node", "line"]
prompts = [f"class Stack:\n    def push(self, {n}):\n        self.items.append(" for n in names]
many = lf.attribute_logits(free, prompts, names, "self", by="head").verify()
for i, name in enumerate(names):
    print(f"{name:6} {many.total[i]:+.2f} in all, {many['L3H4'][i]:+.2f} from L3H4")
many.mean().top(4)

# %% [markdown]
# Two results with the same parts can be subtracted. What makes `item` likelier than `line`?

# %%
(many.select(0) - many.select(-1)).verify().top(4)

# %% [markdown]
# And the true next token at every position of a text, which is 63 directions per row:

# %%
text = lf.evaluation_text("stdlib", free.tokenizer, sequence_length=64, sequences=32)
mean = lf.mean_next_token_attribution(free, text).verify()
print(mean)
mean.top(8)
