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
# # A circuit study: how the model copies an argument's name
#
# In Python, what a method takes is what it uses: after
#
#     def push(self, item):
#         self.items.append(
#
# the next token is likely `item`. The bundled model does this. Which parts of it, and how? Every
# step below is an identity, and is checked by ablation.

# %%
import plotly.graph_objects as go
import torch

import lnfree_interp as lf

lf.plots.show_in_notebooks()

free = lf.load("../lnfree-demo/model")
names = ["item", "name", "value", "key", "data", "path", "line", "text", "other", "node"]
names += ["index", "size", "message", "result", "event", "handler", "parent", "target"]
prompts = [f"class Stack:\n    def push(self, {n}):\n        self.items.append(" for n in names]
answers = [free.to_single_token(name) for name in names]

# %% [markdown]
# ## The behaviour
#
# The prompts differ in nothing but the name.

# %%
tokens = torch.cat([free.to_tokens(prompt) for prompt in prompts])
with torch.no_grad():
    logits = free(tokens)[:, -1]
ranks = (logits > logits.gather(1, torch.tensor(answers)[:, None])).sum(1)
print(f"the name is the most likely token in {(ranks == 0).sum()} of {len(names)} prompts,")
print(f"among the five most likely in {(ranks < 5).sum()}")

# %% [markdown]
# ## Who does it
#
# The logit of the name minus that of `self`, by head, over all prompts.

# %%
by_head = lf.attribute_logits(free, prompts, answers, "self", by="head").verify()
mean, spread = by_head.values.mean(1), by_head.values.std(1)
order = mean.abs().argsort(descending=True)[:8].tolist()
figure = go.Figure(
    go.Bar(
        x=[by_head.labels[i] for i in order],
        y=mean[order].tolist(),
        error_y={"array": spread[order].tolist()},
    )
)
figure.update_layout(
    template="plotly_white",
    title=f"Name minus self, mean over {len(names)} prompts",
    yaxis_title="logit difference (bars: standard deviation)",
)
figure

# %% [markdown]
# One head carries it, and it is in the last layer: nothing comes after it but its own block's MLP.
# Where does it read?

# %%
copier = next(c for c in (by_head.components[i] for i in order) if c.kind == "head")
print("the copier is", copier.label)
by_source = lf.attribute_logits(free, prompts, answers, "self", by="source").verify()
place = tokens[0].tolist().index(free.to_single_token(" " + names[0]))
from_name = by_source[f"{copier.label}@{place}"]
whole = by_head[copier]
print(f"from the argument's token: {from_name.mean():+.2f} of {whole.mean():+.2f}")

# %% [markdown]
# ## The check by ablation
#
# Take the head's output out of the last stream and run final unembedding again: the difference is
# the attribution, prompt by prompt. (With LayerNorm it would not be.)

# %%
additivity = lf.direct_effect_additivity(free, tokens, copier.label, "0_mlp_out").verify()
print(additivity.certificate)


def without_copier(z, hook):
    z[:, -1, copier.index] = 0
    return z


with torch.no_grad(), free.hooks([(f"blocks.{copier.layer}.attn.hook_z", without_copier)]):
    ablated = free(tokens)[:, -1]
ablated_ranks = (ablated > ablated.gather(1, torch.tensor(answers)[:, None])).sum(1)
print(f"without it the name is the most likely token in {(ablated_ranks == 0).sum()} prompts")

# %% [markdown]
# ## What it copies
#
# The embedding's own OV table says nothing of the kind: the token's own logit is nowhere near the
# top. What the head reads is what block 0's MLP made of the token.

# %%
table = lf.ov_table(free, copier.layer, copier.index)
spaced = [free.to_single_token(" " + name) for name in names]
_, cache = free.run_with_cache(tokens)
W_V = free.W_V[copier.layer, copier.index]
for what, found in (
    ("the embedding", table.left[spaced] @ table.right),
    ("0_mlp_out", cache["mlp_out", 0][:, place] @ W_V @ table.right),
    ("all of the stream", cache["resid_pre", copier.layer][:, place] @ W_V @ table.right),
):
    # Where the name itself lands among all tokens.
    ranks_of = (found > found.gather(1, torch.tensor(answers)[:, None])).sum(1)
    print(
        f"reading {what:18}: the name is first for {(ranks_of == 0).sum():2} names, "
        f"median rank {ranks_of.float().median():.0f} of {free.cfg.d_vocab}"
    )

# %% [markdown]
# ## Why it looks there
#
# Its score from the last position to the name, by pairs of components:

# %%
scores = lf.attribute_scores(free, prompts[0], copier.layer, copier.index).verify()
print(f"attention to the name: {scores.log_pattern.exp()[place]:.2f}")
lf.plots.scores(scores, key=place)

# %% [markdown]
# The largest pair has block 0's MLP on both sides. Is it needed? In closed form, and equal to the
# patched run, over all prompts:

# %%
for component in ("0_mlp_out", "L1H4", "pos_embed"):
    found = [
        lf.counterfactual_pattern(free, prompt, copier.layer, copier.index, component).verify()
        for prompt in prompts
    ]
    before = torch.stack([one.original[-1, place] for one in found]).mean()
    after = torch.stack([one.pattern[-1, place] for one in found]).mean()
    print(f"without {component:10} the attention to the name goes from {before:.2f} to {after:.2f}")

# %% [markdown]
# ## The circuit
#
# The paths say it in one picture: token, block 0's MLP, the copier, logit.

# %%
paths = lf.expand_paths(free, prompts[0], answers[0], "self", top_k=15).verify()
print(paths.top(4))
lf.plots.paths(paths)

# %% [markdown]
# What is exact here, and what is not said: the shares are the model's own for these prompts, the
# attention patterns being what they were. Why block 0's MLP turns ` item` into something that reads
# out as `item` is a question for its neurons (`lf.attribute_neuron`, `lf.neuron_output_table`).
