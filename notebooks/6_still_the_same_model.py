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
# # Is my LN-free model still the same model?
#
# A good mean hides a few tokens that went wrong; a bad one can be three sequences in ten thousand.
# `lf.evaluate` puts what has been asked about LN-free models side by side, on any text. With the
# control: the same fine-tuning, norms left in. What it changed is not the removal's doing.

# %%
import lnfree_interp as lf

lf.plots.show_in_notebooks()

models = {
    "original": lf.load(lf.bundled_checkpoint()),
    "vanilla": lf.load("../lnfree-demo/control"),
    "lnfree": lf.load("../lnfree-demo/model"),
}
tokenizer = models["original"].tokenizer
text = lf.evaluation_text("stdlib", tokenizer, sequence_length=256, sequences=48)
evaluation = lf.evaluate(models, text, original="original", text="held-out modules")
evaluation.to_frame().round(4)

# %% [markdown]
# - *Attribution error*: what heads add to the true next token's logit, against what it loses
#   without them. On the LN-free model only rounding is left.
# - *Attribution patching* is the estimate of a patch by one gradient. It is not exact without norms
#   either: attention and GELU stay. With 16 prompts its standard error is large.
# - *Confidence neurons* act through the last norm. This model has none worth the name: ablating its
#   best candidates moves the entropy by less than 0.1 %, with norms and without, so whether removal
#   silences such neurons (as 2507.02559 finds for GPT-2) cannot be seen here.

# %%
lf.plots.direct_effects(evaluation)

# %%
lf.plots.loss_by_position(evaluation)

# %% [markdown]
# Per token, removal costs most at the beginning, where there is little to read; the control does
# not:

# %%
by_position = {name: one.cross_entropy.by_position for name, one in evaluation.models.items()}
early, later = {}, {}
for name in ("vanilla", "lnfree"):
    worse = by_position[name] - by_position["original"]
    early[name], later[name] = worse[:20].mean(), worse[20:].mean()
    print(f"{name:8} first 20 positions {early[name]:+.3f} nats, all later {later[name]:+.3f}")
assert early["lnfree"] > 2 * later["lnfree"]

# %% [markdown]
# And residual norms, which LayerNorm no longer hides:

# %%
lf.plots.residual_norms(evaluation)

# %% [markdown]
# Which tokens got worse?

# %%
losses = {name: one.cross_entropy.per_token for name, one in evaluation.models.items()}
change = losses["lnfree"] - losses["original"]
print(f"worse by more than 1 nat: {(change > 1).double().mean():.2%}")
print(f"better by more than 1 nat: {(change < -1).double().mean():.2%}")
for place in change.flatten().topk(3).indices.tolist():
    block, target = divmod(place, change.shape[1])
    row = text[block]
    before = models["original"].to_string(row[max(0, target - 8) : target + 1])
    token = models["original"].to_string(row[target + 1 : target + 2])
    print(f"{change[block, target]:+.2f} nats for {token!r} after {before!r}")

# %% [markdown]
# So: is it still the same model?

# %%
frame = evaluation.to_frame()
mean, apart = frame.loc["cross-entropy, mean"], frame.loc["Jensen-Shannon divergence"]
for name in ("vanilla", "lnfree"):
    print(
        f"{name:8} {mean[name] - mean['original']:+.4f} nats per token; "
        f"{apart[name]:.4f} nats from the original's predictions"
    )
assert apart["lnfree"] < apart["vanilla"]

# %% [markdown]
# Nearly, on this text and one seed. It predicts a little worse than the original, and its
# predictions are no further from the original's than those of the same fine-tuning with norms:
# its loss was the distance from the original. Single tokens moved by nats both ways, about as
# many better as worse, and a few got worse by more than 3.5 nats, which the control's did not.
# Circuits found here should be checked on the original, as notebook 7 does.
#
# On the command line, beside that folder: `lnfree evaluate lnfree-demo --out found.json`,
# with HellaSwag by `--tasks hellaswag`.
