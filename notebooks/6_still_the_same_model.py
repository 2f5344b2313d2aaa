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
# A good mean hides a few tokens that went wrong; a bad one can be three documents in ten thousand.
# `lf.evaluate` puts everything that has been asked about LN-free models side by side, on any text.

# %%
import lnfree_interp as lf

lf.plots.show_in_notebooks()

models = {"original": lf.load(lf.bundled_checkpoint()), "lnfree": lf.load("../lnfree-demo/model")}
text = lf.evaluation_text("stdlib", models["original"].tokenizer, 256, 48)
evaluation = lf.evaluate(models, text, original="original", text="held-out modules")
evaluation.to_frame().round(4)

# %% [markdown]
# - *Attribution error*: what heads add to the true next token's logit, against what it loses
#   without them. On the LN-free model only rounding is left.
# - *Attribution patching* is the estimate of a patch by one gradient. It is not exact without norms
#   either: attention and GELU stay.
# - *Confidence neurons* act through the last norm; without it there is nothing to act through.

# %%
lf.plots.direct_effects({name: one.direct_effects for name, one in evaluation.models.items()})

# %%
lf.plots.loss_by_position(evaluation)

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
# On the command line: `lnfree evaluate lnfree-demo/model --against ORIGINAL --out evaluation.json`,
# with HellaSwag by `--tasks hellaswag`.
