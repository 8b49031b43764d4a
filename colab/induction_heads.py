# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Induction heads and abrupt learning
#
# A model that has seen `A B` answers a second `A` with `B`. When does it learn that, which heads do
# it, and how can one tell where there are no attention maps? Everything here runs on a CPU in about
# a minute, on three seeds at once; `python -m experiments.induction_heads` and
# `python -m experiments.in_context_classification` are the longer versions.

# %% tags=["skip-execution"]
# In Colab: put the repository beside this notebook first, in a folder `lcattn` (clone or upload).
# On a GPU install "./lcattn[train,cuda]", on a TPU "./lcattn[train,tpu]": JAX and its plugin must
# be of one version.
# %pip install -q "./lcattn[train]"

# %%
import jax
import matplotlib.pyplot as plt

from lcattn import models, nn, probes, tasks, training
from lcattn.probes import classification

# %% [markdown]
# ## 1. Rows that can only be predicted from themselves
#
# A row is a block of random tokens, over and over. The first copy is noise; after it, all is known
# to whoever looks back. Each row has a period of its own, so that positions alone do not help.

# %%
data = tasks.RepeatedTokensConfig(vocab_size=32, length=32, min_period=5, max_period=16)
data.rows(jax.random.key(0), 3)

# %% [markdown]
# ## 2. One layer, with plain and with smeared keys
#
# An induction head looks for the token *after* an earlier copy of its own. With plain keys that
# takes two layers. A smeared key (Olsson et al. 2022) holds some of the token before, and one layer
# is enough. `train_seeds` trains three seeds as one program.


# %%
def problem(mixer: nn.MixerConfig) -> probes.InductionProblem:
    """A model of one layer that learns to repeat."""
    model = models.LMConfig(
        vocab_size=32, width=32, num_layers=1, pattern=("mixer",), mixers={"mixer": mixer},
        mlp_width=0, init_std=0.2,
    )  # fmt: skip
    return probes.InductionProblem(model=model, data=data, period=8, eval_rows=16)


problems = {
    "plain keys": problem(nn.SoftmaxAttentionConfig(num_heads=2)),
    "smeared keys": problem(nn.SmearedAttentionConfig(num_heads=2)),
}
run = training.SeedsConfig(
    num_steps=120,
    num_seeds=3,
    eval_every=15,
    optimizer=training.OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.0),
)
results = {name: training.train_seeds(each, run) for name, each in problems.items()}


# %%
def band(axes, x, values, label):
    """The mean over seeds, `[points, seeds]`, and all that lies between the extremes."""
    (line,) = axes.plot(x, values.mean(axis=1), label=label)
    axes.fill_between(x, values.min(axis=1), values.max(axis=1), alpha=0.2, color=line.get_color())


figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
for name, result in results.items():
    band(axes[0], result.steps, result.metrics["repeat_accuracy"], name)
    band(axes[1], result.steps, result.metrics["in_context_score"], name)
    band(axes[2], result.steps, result.metrics["prefix_matching/0"].max(axis=-1), name)
for ax, label in zip(
    axes, ["accuracy in later copies", "in-context score (nats)", "prefix matching"], strict=True
):
    ax.set(xlabel="steps", ylabel=label)
axes[0].legend()
plt.show()

# %% [markdown]
# ## 3. Where a head looks
#
# `attention_maps` takes the maps from any mixer that has one: softmax, linear attention, states
# that decay, the delta rule. Here is the strongest head of the first seed: a stripe, one place
# after the earlier copies of each token.

# %%
smeared, result = problems["smeared keys"], results["smeared keys"]
first_seed = jax.tree.map(lambda x: x[0], (result.params, result.model_state))
model = smeared.model_def.merge(*first_seed)
rows = tasks.repeated_tokens(jax.random.key(1), 1, period=8, copies=3, vocab_size=32)
maps = probes.attention_maps(model, rows)[0]
head = int(probes.prefix_matching(maps, rows).value.argmax())
plt.imshow(maps[0, head], cmap="cividis")
plt.xlabel("token looked at")
plt.ylabel("token looking")
plt.colorbar(label="attention")
plt.show()

# %% [markdown]
# ## 4. The same question without an attention map
#
# Replace one token and see which answers suffer: *occlusion* works on any model. And the plainest
# test of all: change nothing but the source of an answer. A copier's answer changes with it;
# whoever knows answers by heart does not notice.

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for ax, (name, result) in zip(axes, results.items(), strict=True):
    found = probes.attributions(problems[name], result.params, result.model_state, num_rows=8)
    image = ax.imshow(found.occlusion.mean(axis=0), cmap="cividis", vmin=0, vmax=6)
    ax.set(title=name, xlabel="token replaced", ylabel="answer of token")
    print(f"{name}: probability of the changed source {result.final('copied').mean():.2f}")
figure.colorbar(image, ax=axes, label="log probability lost (nats)")
plt.show()

# %% [markdown]
# ## 5. Why the change is abrupt
#
# Reddy (2024): a network sees items with labels and is asked for the label of one more item.
# Reduced to two numbers, an induction head is beta1 (a label looks back at its item) and beta2 (the
# target looks for its likes), with an MLP behind. Neither helps without the other.

# %%
two = classification.ItemLabelProblem(
    data=tasks.ItemLabelConfig(
        num_classes=64, num_labels=16, content_size=32, num_items=4, max_items=4, fresh=1.0
    ),
    network=classification.TwoParameterNetwork(mlp_width=64),
    eval_size=128,
)
descent = training.SGDConfig(learning_rate=0.3, clip_norm=1.0)
learned = training.train_seeds(
    two, training.SeedsConfig(num_steps=600, num_seeds=3, eval_every=60, optimizer=descent)
)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
measures = {
    "context_label": "answers with some label of the context",
    "ic/accuracy": "answers with the right label",
    "first_to_item": "layer 1: labels look at their items",
    "second_to_right_labels": "layer 2: target looks at right labels",
}
for name, label in measures.items():
    band(axes[0], learned.steps, learned.metrics[name], label)
for name in ("beta1", "beta2"):
    band(axes[1], learned.steps, learned.metrics[name], name)
for ax, label in zip(axes, ("share", "value of the parameter"), strict=True):
    ax.set(xlabel="steps", ylabel=label)
    ax.legend()
plt.show()

# %% [markdown]
# Three numbers under gradient descent show why: with more labels than items it pays to answer with
# *some* label of the context, and from there the rest can be learned. With as many labels as items
# (L = 8) it pays nothing, and nothing is ever learned.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3), sharey=True, layout="constrained")
for ax, labels in zip(axes, (32, 9, 8), strict=True):
    path = classification.three_logit(labels)
    ax.plot(path.context_label, label="any label of the context")
    ax.plot(path.right_label, label="the right label")
    ax.set(title=f"L = {labels}", xlabel="steps", ylabel="probability")
axes[0].legend()
plt.show()
