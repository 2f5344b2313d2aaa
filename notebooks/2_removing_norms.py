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
# # Removing norms, with hooks of your own
#
# `remove_norms` fine-tunes a copy of a model while its norms are frozen one after the other. Hooks
# stay active throughout: you can watch, or change, any activation while it happens. This is a short
# run, for the look of it; `make demo` reads eight times as much text.

# %%
import plotly.graph_objects as go
import torch

import lnfree_interp as lf

lf.plots.show_in_notebooks()

model = lf.load(lf.bundled_checkpoint())
sites = lf.list_norm_sites(model)
print(len(sites), "norm sites:", *sites[:4], "...")

# %% [markdown]
# A recipe is plain data: which site is frozen at which step, learning rates, losses.

# %%
recipe = lf.recipes.distilled(model, steps=60)
first, last = recipe.events[0], recipe.events[-1]
print(f"{recipe.steps} steps; {first.site} at step {first.step}, ..., {last.site} at {last.step}")

# %% [markdown]
# A hook that watches how large the MLP of block 0 writes. It is there in every forward pass, also
# in those that measure a site's sigma before it is frozen; only training passes have gradients.

# %%
seen = []


def watch(mlp_out, hook):
    if torch.is_grad_enabled():
        seen.append(mlp_out.detach().float().norm(dim=-1).mean().item())


data = lf.pack(lf.stdlib_corpus("train"), model.tokenizer, sequence_length=128)
heldout = lf.pack(lf.stdlib_corpus("heldout"), model.tokenizer, sequence_length=128)[::8]
run = lf.remove_norms(
    model, recipe, data, fwd_hooks=[("blocks.0.hook_mlp_out", watch)], log_every=2, progress=False
)
lf.plots.training_curve({"lnfree": run})

# %%
passes = recipe.batch // recipe.micro_batch  # for each step
assert len(seen) == recipe.steps * passes
figure = go.Figure(go.Scatter(x=[i / passes for i in range(len(seen))], y=seen))
figure.update_layout(
    template="plotly_white",
    title="What the hook saw",
    xaxis_title="step",
    yaxis_title="mean norm of 0_mlp_out (residual units)",
)
figure

# %% [markdown]
# How far the inputs of frozen sites drift from the constants that they are divided by. A line that
# runs away is a stream that nothing holds any more: a lower rate or wider gaps between events help.

# %%
lf.plots.sigma_drift(run)

# %% [markdown]
# Folding merges the constants into the weights. The logits stay, and nothing is left of the norms.

# %%
free = lf.fold(run.model)
print("folded against frozen:", lf.compare_logits(free, run.model))
for name, one in (("original", model), ("LN-free", free)):
    print(f"{name:9}", lf.evaluate_loss(one, heldout))

# %% [markdown]
# So short a run costs more than `make demo`'s. What of it is the norms', and not the fine-tuning's,
# only the control tells: `lf.remove_norms(model, recipe.vanilla(), data)`, compared in notebook 6.
#
# `lf.export(run.model, "my-model")` writes a folder that plain transformers loads.
