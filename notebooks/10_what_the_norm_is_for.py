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
# # What is the norm for?
#
# Removing a norm is one way to ask. Others: move it, add one, scale it by depth, put another map in
# its place, train without it from the first step. Here each is one call on the same sites, trained
# by the same loop and read by the same analyses.

# %%
from dataclasses import replace

import lnfree_interp as lf

lf.plots.show_in_notebooks()
model = lf.load(lf.bundled_checkpoint())
train, heldout = (
    lf.pack(lf.stdlib_corpus(split), model.tokenizer, 64) for split in ("train", "heldout")
)
text = heldout[:24]

# %% [markdown]
# ## What a trained model loses
#
# Each norm frozen alone: every token divided by one constant, no training.

# %%
costs = lf.site_sensitivity(model, text, progress=False)
print(costs)
costs.top(4)

# %% [markdown]
# What does not matter at all: that LayerNorm subtracts the mean (RMSNorm of a centred stream is the
# same function), and a factor that depends on depth (LayerNorm Scaling, with gains to match). Both
# are exact, so whatever these architectures do for a model, they do it while it trains.

# %%
for variant in (lf.to_rms(model), lf.to_layernorm_scaling(model)):
    print(f"{variant.name:18} same function: {variant.same_function}, error {variant.error}")
    assert variant.same_function

# %% [markdown]
# Another map at every site is another function. A hyperbolic tangent has no statistic to compute;
# what is left of the model when it takes over, and after a short distillation from the model that
# it was made of?

# %%
tanh = lf.to_dyt(model, tokens=train[:16])
recipe = lf.recipes.finetuning(steps=30, distillation=1.0)
tuned = lf.finetune(tanh.model, recipe, train, teacher=model, progress=False)
losses = {
    "LayerNorm": lf.evaluate_loss(model, text).mean,
    "tanh, untrained": lf.evaluate_loss(tanh.model, text).mean,
    "tanh, 30 steps": lf.evaluate_loss(tuned.model, text).mean,
}
for name, loss in losses.items():
    print(f"{name:16} {loss:.3f} nats per token")
assert losses["LayerNorm"] < losses["tanh, 30 steps"] < losses["tanh, untrained"]

# %% [markdown]
# It is no shortcut to an exact analysis: tanh(a + b) is not tanh(a) + tanh(b). Its sites are frozen
# like any other norm's.
#
# ## What depth does, with norms and without
#
# A Pre-LN stream may grow without anybody noticing, since every reader divides by its size. Then
# late blocks add little to a large stream, and their Jacobian is close to the identity: the curse
# of depth (arXiv 2502.05795). A report of the bundled model and of what a short removal makes
# of it:

# %%
removal = lf.recipes.distilled(model, steps=40)
free = lf.fold(lf.remove_norms(model, removal, train, progress=False).model)
reports = {
    "original": lf.depth_report(model, text, prompts=2, progress=False),
    "lnfree": lf.depth_report(free, text, prompts=2, progress=False),
}
for name, report in reports.items():
    print(name, report, "about the function:", ", ".join(report.basis_free), sep="\n  ")
assert reports["lnfree"].basis_free == ("eigenvalues", "loss_without")

# %% [markdown]
# The second answer is short for a reason. Without norms the stream can be written in any basis, so
# that its variance, angles and distances are facts about the basis that training found. Losses and
# eigenvalues stay what they are in every basis. Dotted lines are those to be careful with. With
# live norms only one factor for the whole stream is free: read its variance as growth.

# %%
lf.plots.depth(reports)

# %%
lf.plots.spectrum(reports["lnfree"])

# %% [markdown]
# In both models the first block does most, and none of the four is idle.
#
# ## From the first step
#
# Small models of three architectures, the same text and steps: norms before sublayers, norms on
# both sides of them (Peri-LN), and none, only constants. The rate of `from_scratch`, 2e-3, is too
# high for the third, which diverges after a few steps, so all have a quarter of it.

# %%
architectures = {
    "Pre-LN": lambda new: new,
    "Peri-LN": lambda new: lf.to_peri_ln(new).model,
    "LN-free": lambda new: frozen_at_once(new),
}


def frozen_at_once(new):
    """Norms that divide by a constant from the first step on."""
    sited = lf.with_norm_sites(new)
    for site in lf.list_norm_sites(sited):
        lf.freeze_site(sited, site, sigma=0.03)  # about the scale of the stream before training
    return sited


runs = {}
for name, make in architectures.items():
    new = lf.untrained(model, n_layers=6, d_model=48, n_heads=4, n_ctx=64, seed=0)
    recipe = replace(lf.recipes.from_scratch(steps=60, batch=4), lr=5e-4, warmup=15)
    runs[name] = lf.train(make(new), recipe, train, progress=False)
    print(f"{name:8} {lf.evaluate_loss(runs[name].model, text).mean:.3f} nats per token")

# %% [markdown]
# Sixty steps teach little more than which tokens are frequent. At this rate norms are no advantage:
# what the model of constants cannot do is take larger steps. Gradients by layer and kind of weight:

# %%
balances = {name: lf.GradientBalance.of_run(run, from_step=20) for name, run in runs.items()}
lf.plots.gradient_balance(balances, ["attn.W_V", "attn.W_O", "mlp.W_out"])

# %%
lf.plots.depth({name: lf.depth_report(run.model, text, progress=False, eigenvalues=0)
                for name, run in runs.items()})  # fmt: skip

# %% [markdown]
# The norms of a variant are removed as those of any model, and what is left is a stock
# `HookedTransformer` whose logits are exact sums:

# %%
peri = runs["Peri-LN"].model
run = lf.remove_norms(peri, lf.recipes.distilled(peri, steps=40), train, progress=False)
exact = lf.fold(run.model)
logit = lf.attribute_logits(exact, "for i in range", " in", by="head").verify()
print(f"{len(lf.live_sites(peri))} norms before; {logit.certificate}")

# %% [markdown]
# So: what is the norm for? Not for the function: constants do nearly as well in a trained model, at
# a price that removal measures. It is for training, where it keeps every sublayer's input at one
# size while everything before it changes. `python benchmarks/norm_variants.py rows.jsonl` compares
# ten architectures at two depths, with seeds.
