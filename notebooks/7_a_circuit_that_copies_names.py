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
# the next token is likely `item`. The bundled model does this. Which parts of it, and how? Sums are
# exact, and what they claim is checked by experiments that do not rest on them: ablations, patching
# with another prompt's activations, the model with its norms, and real code.

# %%
import ast
from collections import Counter

import pandas as pd
import torch

import lnfree_interp as lf

lf.plots.show_in_notebooks()
torch.set_grad_enabled(False)

free = lf.load("../lnfree-demo/model")
original = lf.load(lf.bundled_checkpoint())
models = {"original": original, "LN-free": free}

# %% [markdown]
# ## The behaviour
#
# The names are not chosen by hand: the 40 most common parameters of the held-out modules that are
# one token both after a space and without one (`self`, `cls` and single letters apart).

# %%
vocabulary, parameters = free.tokenizer.get_vocab(), Counter()
for document in lf.stdlib_corpus("heldout"):
    for node in ast.walk(ast.parse(document["text"])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters.update(argument.arg for argument in node.args.args)
names = [
    name for name, _ in parameters.most_common()
    if {name, "Ġ" + name} <= vocabulary.keys() and len(name) > 1 and name not in ("self", "cls")
][:40]  # fmt: skip
answers = torch.tensor([free.to_single_token(name) for name in names])
spaced_answers = torch.tensor([free.to_single_token(" " + name) for name in names])
SELF = free.to_single_token("self")
print(*names)


# %%
def prompts_of(template):
    return torch.cat([free.to_tokens(template.replace("NAME", name)) for name in names])


def difference(logits):
    """Logit of the name minus that of `self`, at the end of each prompt."""
    return logits[:, -1].gather(1, answers[:, None])[:, 0] - logits[:, -1, SELF]


def found(logits, wanted=answers):
    """In how many prompts the name is the most likely next token."""
    return int((logits[:, -1].argmax(-1) == wanted).sum())


METHOD = "class Stack:\n    def push(self, NAME):\n        "
templates = {
    "self.items.append(": METHOD + "self.items.append(",
    "self.check(": METHOD + "self.check(",
    "if not isinstance(": METHOD + "if not isinstance(",
    "print( in a function": "def visit(NAME):\n    print(",
    "(NAME, count)": "class Stack:\n    def push(self, NAME, count):\n        self.items.append(",
    "(count, NAME)": "class Stack:\n    def push(self, count, NAME):\n        self.items.append(",
    "self.item =": METHOD + "self.item =",
    "return": METHOD + "return",
}
COUNT = torch.tensor(free.to_single_token("count"))
rows = {}
for where, text in templates.items():
    wanted = answers if text.endswith("(") else spaced_answers
    row = {}
    for label, model in models.items():
        logits = model(prompts_of(text))
        row[label] = found(logits, wanted)
        row[f"{label} says count"] = found(logits, COUNT) if "count" in where else "-"
    rows[where] = row
print(f"of {len(names)}, most likely is the name:")
pd.DataFrame(rows).T

# %% [markdown]
# In calls (where the name has no space before it) the model mostly says the only argument's name,
# and with two arguments it is unsure; elsewhere it repeats it less. Removing the norms has not
# changed that much. From here on the first template; the last sections go back to the others and
# to real code. Where it fails, the model says this instead:

# %%
tokens = prompts_of(templates["self.items.append("])
words = free.to_str_tokens(tokens[0])
place = words.index(" " + names[0])
clean = free(tokens)
traces = {label: lf.trace(model, tokens, hold=True) for label, model in models.items()}
trace, target = traces["LN-free"], lf.LogitDifference(answers, SELF)
top = clean[:, -1].argmax(-1)
failures = [
    (name, free.to_string(t)) for name, t, a in zip(names, top, answers, strict=True) if t != a
]
print(f"{found(clean)} of {len(names)}; name minus self {difference(clean).mean():+.2f}")
print("it fails for", *(f"{name} ({said})" for name, said in failures))

# %% [markdown]
# ## Who writes it
#
# The logit of the name minus that of `self`, by part, over all prompts: exact, and the spread says
# which parts depend on the name.

# %%
by_head = trace.attribute(target, by="head").verify()
table = pd.DataFrame(
    {"mean": by_head.values.mean(1), "spread": by_head.values.std(1)}, index=by_head.labels
)
heads = [component for component in by_head.components if component.kind == "head"]
copier = max(heads, key=lambda head: float(by_head[head].mean()))
assert copier.label == "L3H4"
table.loc[table["mean"].abs().sort_values(ascending=False).index[:8]].round(2)

# %% [markdown]
# One head stands out, in the last layer. `0_mlp_out` at the last position, which knows hardly more
# than the token `(`, argues for `self`, but with a large spread; more on that below. What does the
# head read?

# %%
by_source = trace.attribute(target, by="source").verify()
from_name = by_source[f"{copier.label}@{place}"]
pattern = trace.act("pattern", copier.layer)[:, copier.index, -1, place]
print(f"{copier.label}: {by_head[copier].mean():+.2f}, from the argument {from_name.mean():+.2f}")
print(f"it looks at the argument with {pattern.mean():.2f} (at least {pattern.min():.2f})")

# %% [markdown]
# ## Is the attribution true?
#
# Taking a head out of the last stream must change the logit difference by its attribution. On an
# LN-free model it does, prompt by prompt; with the norms it is an estimate.

# %%
for label, one in traces.items():
    effects = lf.ablate(one, copier).compare(target)
    miss = (effects.predicted - effects.direct).abs().max()
    print(
        f"{label:9} predicted {effects.predicted.mean():+.2f}, measured "
        f"{effects.direct.mean():+.2f}; largest miss in a prompt {miss:.1e}"
    )
    assert label == "original" or miss < 1e-3

# %% [markdown]
# ## Is the head needed?
#
# Its output is replaced by that of a prompt with another name (the name is lost, everything else
# stays), by its mean over prompts and positions, or by zero. All heads, for comparison, by that of
# another prompt.

# %%
other = torch.roll(torch.arange(len(names)), 1)
others = {label: lf.trace(model, tokens[other]) for label, model in models.items()}


def names_found(one, labels, with_):
    """In how many prompts the name is first, with components replaced."""
    hooks = lf.ablate(one, labels, with_).hooks()
    return found(one.view.model.run_with_hooks(one.tokens, fwd_hooks=hooks))


rows = {}
for how in ("another prompt", "mean", "zero"):
    rows[f"{copier.label}: {how}"] = {
        label: names_found(one, copier, others[label] if how == "another prompt" else how)
        for label, one in traces.items()
    }
print(pd.DataFrame(rows).T)
left = {head.label: names_found(trace, head, others["LN-free"]) for head in heads}
print("\nfewest names left with a head's output from another prompt:")
print(pd.Series(left).sort_values()[:5].to_string())
assert sorted(left, key=left.get)[:2] == [copier.label, "L0H2"]

# %% [markdown]
# Needed, with and without norms (and `L0H2`, second in the list, too: see below). Ablation is a
# total effect: later parts react. Since nothing is normalised, the change of the logit difference
# is exactly the sum of the changes of all parts, and results can be subtracted:


# %%
def changes(intervention):
    """By part, what an intervention changes in the mean logit difference; exact."""
    inputs = intervention.trace.tokens
    before = lf.trace(free, inputs).attribute(target, by="head")
    with free.hooks(intervention.hooks()):
        after = lf.trace(free, inputs).attribute(target, by="head")
    change = (after - before).mean().verify()
    largest = change.top(3).itertuples()
    parts = ", ".join(f"{row.component} {row.value:+.2f}" for row in largest)
    return f"{change.total:+.2f} = {parts}, ..."


print("copier replaced:", changes(lf.ablate(trace, copier, others["LN-free"])))

# %% [markdown]
# ## Is it enough?
#
# Now the other way round. In prompts with *another* name, heads get the outputs that they have with
# the right one. Which of them bring the name back?

# %%
corrupted = others["LN-free"]
floor, ceiling = difference(free(corrupted.tokens)).mean(), difference(clean).mean()


def restored(labels):
    patched = lf.ablate(corrupted, labels, with_=trace).compare(target)
    return float(-patched.total_effect[-1].mean() / (ceiling - floor))


alone = {head.label: restored(head) for head in heads}
print(pd.Series(alone).sort_values(ascending=False)[:4].map("{:.0%}".format).to_string())

# %% [markdown]
# There is a second route, which attribution by head could not show: `L0H2` adds next to nothing to
# the logit itself. What does it do?

# %%
early = next(head for head in heads if head.label == "L0H2")
assert sorted(alone, key=alone.get)[-2:] == ["L0H2", "L3H4"]
early_pattern = trace.act("pattern", early.layer)[:, early.index, -1]
looks = early_pattern.mean(0).topk(2)
print(f"L0H2 itself: {by_head[early].mean():+.2f}; it looks at")
for share, at in zip(looks.values.tolist(), looks.indices.tolist(), strict=True):
    print(
        f"    {share:.2f} position {at}" + (", the argument" if at == place else f", {words[at]!r}")
    )
for head in (early, copier):
    print(f"{head.label} patched:", changes(lf.ablate(corrupted, head, with_=trace)))

# %% [markdown]
# It looks at the argument from the last position, more than at anything else, and MLPs *there*,
# mostly block 0's, turn what it brings into the name: this is the spread of `0_mlp_out` above. How
# much the two routes bring back, over five ways to pair the prompts, and where the model is right:

# %%
rows, right = {}, clean[:, -1].argmax(-1) == answers
for label, chosen in {"L3H4": [copier], "L0H2": [early], "both": [copier, early]}.items():
    shares, shares_right, counts = [], [], []
    for shift in (1, 3, 7, 11, 17):
        from_other = lf.trace(free, tokens[torch.roll(torch.arange(len(names)), shift)])
        low, high = difference(free(from_other.tokens)), difference(clean)
        hooks = lf.ablate(from_other, chosen, with_=trace).hooks()
        logits = free.run_with_hooks(from_other.tokens, fwd_hooks=hooks)
        gained = difference(logits) - low
        shares.append(float(gained.mean() / (high - low).mean()))
        shares_right.append(float(gained[right].mean() / (high - low)[right].mean()))
        counts.append(found(logits))
    rows[label] = {
        "of the logit difference": f"{min(shares):.0%} to {max(shares):.0%}",
        "where it is right": f"{min(shares_right):.0%} to {max(shares_right):.0%}",
        f"names first again, of {int(right.sum())}": f"{min(counts)} to {max(counts)}",
    }
    assert label != "both" or min(shares) > 0.7
pd.DataFrame(rows).T

# %% [markdown]
# ## What the copier reads
#
# Not the embedding: in the head's own OV table a token's spaced form does not point to the bare
# one. Block 0's MLP does the translation, to the top or near it. Reading parts of the stream at
# the argument with the head's values (without `b_V`, which is the same for every name):

# %%
ov = lf.ov_table(free, copier.layer, copier.index)
spaced = [free.to_single_token(" " + name) for name in names]
W_V = free.W_V[copier.layer, copier.index]
for what, logits in (
    ("the embedding", ov.left[spaced] @ ov.right),
    ("0_mlp_out", trace.act("mlp_out", 0)[:, place] @ W_V @ ov.right),
    ("the whole stream", trace.act("resid_pre", copier.layer)[:, place] @ W_V @ ov.right),
):
    ranks = (logits > logits.gather(1, answers[:, None])).sum(1)
    print(
        f"{what:17} the name is first for {(ranks == 0).sum():2} of {len(names)}, "
        f"median rank {ranks.float().median():.0f} of {free.cfg.d_vocab}"
    )

# %% [markdown]
# ## Why it looks there
#
# Its score from the last position to the argument by pairs of parts, for one prompt; then, over all
# prompts, what the keys know. The closed form: a part's share of the key is replaced, nothing else.

# %%
scores = lf.attribute_scores(trace.select(0), copier.layer, copier.index).verify()
lf.plots.scores(scores, key=place)

# %%
L, H = copier.layer, copier.index
q, k = trace.act("q", L)[:, -1, H], trace.act("k", L)[:, :, H]


def attention(k):
    scores = torch.einsum("bkd,bd->bk", k, q) / free.cfg.d_head**0.5
    return float(scores.softmax(-1)[:, place].mean())


rows = {}
for label, part in (("0_mlp_out", 0), ("1_attn_out", 1), ("2_attn_out", 2)):
    share, row = trace.act(label[2:], part)[:, place] @ free.W_K[L, H], {}
    for how, new in (("without it", 0 * share), ("same for all names", share.mean(0))):
        replaced = k.clone()
        replaced[:, place] += new - share
        row[how] = attention(replaced)
    rows[label] = row
replaced = k.clone()
replaced[:, place] = k[:, place].mean(0)
rows["the whole key"] = {"without it": float("nan"), "same for all names": attention(replaced)}
print(f"attention to the argument {attention(k):.2f}; with the part of its key")
print(pd.DataFrame(rows).T.round(2))
assert rows["the whole key"]["same for all names"] > 0.9 * attention(k)

# %% [markdown]
# The key says that an argument stands there, not which: with the same key for all names the head
# looks as before. `0_mlp_out` and what layer 2's heads add make it. The value carries the name.
#
# ## The paths in one picture
#
# Sources on the left, each at its position: `0_mlp_out` at the argument through L3H4 is the first
# route; `0_mlp_out` at the last position, straight to the logit, holds the second, beside what `(`
# says to every name alike.

# %%
prompt = names.index("item")
paths = lf.expand_paths(trace.select(prompt), int(answers[prompt]), SELF, top_k=12).verify()
print(paths.top(4))
assert paths.labels[0] == f"0_mlp_out@{place} > {copier.label}"
lf.plots.paths(paths)

# %% [markdown]
# ## In other prompts, and in real code
#
# The head was found on one template. What is left of the names in the others, with its output from
# a prompt with another name?

# %%
rows = {}
for where, text in list(templates.items())[:4]:
    inputs = lf.trace(free, prompts_of(text))
    another = lf.trace(free, inputs.tokens[other])
    row = {"as it is": found(free(inputs.tokens))}
    for head in (copier, early):
        row[f"without {head.label}"] = names_found(inputs, head, another)
    rows[where] = row
    assert row["without L3H4"] < row["as it is"] / 2
pd.DataFrame(rows).T

# %% [markdown]
# And on held-out modules: with the head at its mean over the text, how much worse is a token that
# repeats, without a space, a word that stands with one among the last 255 tokens; after `(` and
# elsewhere?

# %%
text = lf.evaluation_text("stdlib", free.tokenizer, sequence_length=256, sequences=96)
word = {i: free.to_string([i]) for i in range(free.cfg.d_vocab)}
bare = {i: vocabulary.get("Ġ" + w) for i, w in word.items() if w.isidentifier() and len(w) > 1}
shape = (len(text), text.shape[1] - 1)
repeats, opened = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
for b, row in enumerate(text.tolist()):
    for t in range(1, len(row)):
        repeats[b, t - 1] = bare.get(row[t]) in row[:t]
        opened[b, t - 1] = word[row[t - 1]].endswith("(")

hook = f"blocks.{copier.layer}.attn.hook_z"
mean_z = torch.cat(
    [free.run_with_cache(part, names_filter=hook)[1][hook] for part in text.split(16)]
)[:, :, copier.index].mean((0, 1))


def to_mean(z, hook):
    z[:, :, copier.index] = mean_z
    return z


before = lf.evaluate_loss(free, text).per_token
with free.hooks([(hook, to_mean)]):
    after = lf.evaluate_loss(free, text).per_token
change, rows = after - before, {}
for label, where in {
    "repeats, after (": repeats & opened,
    "repeats, elsewhere": repeats & ~opened,
    "no repeat, after (": ~repeats & opened,
    "no repeat, elsewhere": ~repeats & ~opened,
}.items():
    some = change[where]
    rows[label] = {
        "tokens": len(some),
        "loss": round(before[where].mean().item(), 2),
        "change": round(some.mean().item(), 3),
        "standard error": round((some.std() / len(some) ** 0.5).item(), 3),
        "median change": round(some.median().item(), 3),
    }
assert min(rows["repeats, after ("]["change"], rows["repeats, elsewhere"]["change"]) > 0.3
pd.DataFrame(rows).T

# %% [markdown]
# The head is not special to calls: it copies a word that stood with a space to where it stands
# without one, in calls and elsewhere alike (after `(` for fewer tokens: the median hardly moves).
# The prompts above are one use of it.
#
# ## What is known, and what is not
#
# Two routes copy the argument's name to a call: L3H4 moves what block 0's MLP made of it at the
# argument, and L0H2 brings it to the end, where MLPs make it the name. Both are needed: with the
# first one's output from another prompt hardly a name is left, with the second's about half of
# them; the original model, with its norms, loses the names with the same head. Neither is enough
# alone; together they bring back most of the logit difference and of the names. The sums, the score
# by pairs and the closed forms are exact. That the parts named here are the circuit rests on the
# experiments, on one small model.
#
# Not explained: how block 0's MLP translates ` item` into `item` (`lf.attribute_neuron` and
# `lf.neuron_output_table` are where to start), what builds the "an argument stands here" of the
# key, and what L1H4 is for.
