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
# # In-context learning as gradient descent
#
# A layer of linear self-attention can make a step of gradient descent in its forward pass (von
# Oswald et al. 2022, arXiv 2212.07677), and training finds just that step (Mahankali et al. 2023,
# arXiv 2307.03576). Here both are seen in a minute on a CPU: the weights by hand, the weights by
# training, what they do on inputs unlike those of training, and the same question put to other
# mechanisms of the library.

# %% tags=["skip-execution"]
# In Colab: put the repository beside this notebook first, in a folder `lcattn` (clone or upload).
# On a GPU install "./lcattn[train,cuda]", on a TPU "./lcattn[train,tpu]": JAX and its plugin must
# be of one version.
# %pip install -q "./lcattn[train]"

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from lcattn import nn, training
from lcattn.probes import regression as probes
from lcattn.tasks.regression import LinearRegressionConfig, random_covariance

# %% [markdown]
# ## 1. The task
#
# Every row has a linear function of its own, ten examples of it and a query. A token is an input
# with its label, $[x_i; y_i]$; the last one asks: $[x_q; 0]$.

# %%
task = LinearRegressionConfig(dim=10, num_examples=10)
rows = task.sample(jax.random.key(0), 2000)
tokens = rows.tokens()
tokens.shape

# %% [markdown]
# ## 2. A layer that is a step of gradient descent
#
# One layer of linear self-attention, $e_j \leftarrow e_j + P \sum_i (W_V e_i)(W_K e_i)^\top W_Q
# e_j$, can be given weights with which it makes the step
# $\Delta W = -\frac{\eta}{n} \sum_i (W_0 x_i - y_i) x_i^\top$. The prediction is minus the last
# coordinate of the query. What it says and what explicit gradient descent says is the same:

# %%
rate = probes.best_rate(task, jax.random.key(1))
descent = probes.DescentConfig(rates=(rate,))
by_hand = probes.gradient_step(task.dim, rate, task.num_examples)
print("best rate:", round(rate, 2), " in closed form:", probes.optimum(task).matrix[0, 0] * 10)
abs(probes.predict([by_hand], tokens) - descent(tokens)).max()

# %% [markdown]
# ## 3. What training finds
#
# One head, which is easy to read. Three seeds are trained at once, as one program.
# (`experiments.icl_gd` trains five for longer.)

# %%
problem = probes.RegressionProblem(
    model=probes.LSAConfig(token_size=task.token_size),
    task=task,
    references={"GD": descent},
    batch_size=128,
    eval_size=1000,
)
run = training.SeedsConfig(
    num_steps=500,
    num_seeds=3,
    eval_every=50,
    optimizer=training.OptimizerConfig(
        learning_rate=1e-2, beta2=0.98, weight_decay=0.0, clip_norm=10.0, final_lr_fraction=0.0
    ),
)
trained = training.train_seeds(problem, run)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.plot(trained.steps, trained.metrics["loss"], color="C0")
left.axhline(trained.metrics["GD/loss"][0, 0], color="C1", linestyle="--", label="GD, best step")
left.set(xlabel="step", ylabel="½ MSE", title="loss of three seeds")
left.legend()
right.plot(trained.steps, trained.metrics["GD/cos"], color="C0")
right.set(xlabel="step", ylabel="cosine", title="sensitivity to the query: trained and GD")
plt.show()

# %% [markdown]
# The weights themselves, up to what cannot be told apart: scores are the identity without its last
# entry, and one number is written.

# %%
layer = trained.params["layers"][0]
weights = probes.LSAWeights(*(layer[name][0] for name in ("query", "key", "value", "out")))
figure, axes = plt.subplots(2, 2, figsize=(7, 6))
for row, (name, shown) in zip(axes, {"trained": weights, "by hand": by_hand}.items(), strict=True):
    for axis, product, title in zip(
        row, probes.normalized_products(shown, task.dim), ("$W_K^T W_Q$", "$P W_V$"), strict=True
    ):
        picture = axis.imshow(product[0], cmap="RdBu", vmin=-1, vmax=1)
        axis.set(title=f"{name}: {title}", xticks=[], yticks=[])
figure.colorbar(picture, ax=axes)
plt.show()

# %% [markdown]
# ## 4. Off the beaten track
#
# If the layer *is* that step, it must fail where the step fails: on inputs larger than those of
# training the rate is too large, for both alike.

# %%
factors = np.array([0.5, 0.75, 1.0, 1.5, 2.0])
losses = {"trained": [], "GD": []}
for factor in factors:
    shifted = task.replace(scale=float(factor)).sample(jax.random.key(2), 2000)
    losses["trained"].append(probes.half_mse(probes.predict([weights], shifted.tokens()),
                                             shifted.target))  # fmt: skip
    losses["GD"].append(probes.half_mse(descent(shifted.tokens()), shifted.target))
plt.figure(figsize=(4.5, 3.2))
plt.semilogy(factors, losses["trained"], "o-", label="trained layer")
plt.semilogy(factors, losses["GD"], "s--", label="GD, best step")
plt.xlabel("inputs × α")
plt.ylabel("½ MSE")
plt.legend()
plt.show()

# %% [markdown]
# ## 5. The optimum, also where it is not plain gradient descent
#
# For normal inputs of covariance Σ and weights of covariance Σ⁻¹ the best layer makes a
# *preconditioned* step: the matrix it applies is a multiple of Σ⁻¹. No training is needed to see
# it: regress the target on what such a layer can say.

# %%
curved = LinearRegressionConfig(
    dim=4, num_examples=8, law="normal", covariance=random_covariance(4),
    teacher_covariance=random_covariance(4, inverse=True),
)  # fmt: skip
best = probes.optimum(curved).matrix
sample = curved.sample(jax.random.key(3), 50_000)
b = probes.learners.correlation(sample.x, sample.y)
pairs = np.einsum("bi,bj->bij", sample.query, b).reshape(len(b), -1)
fitted = np.linalg.lstsq(pairs, np.asarray(sample.target))[0]
plt.figure(figsize=(3.6, 3.4))
plt.plot(best.ravel(), fitted, "o")
plt.plot([best.min(), best.max()], [best.min(), best.max()], "k--", linewidth=1)
plt.xlabel("entry of M*, closed form")
plt.ylabel("entry of M, fitted")
plt.show()

# %% [markdown]
# ## 6. Any mechanism
#
# The probe needs predictions and gradients alone, so any mixer of the library can take the layer's
# place, between a linear embedding and a linear read-out. Here are two, briefly;
# `experiments.icl_mixers` trains all of them.

# %%
mixers = {
    "softmax": nn.SoftmaxAttentionConfig(num_heads=2, position_encoding="nope"),
    "convolution": nn.ShortConvolutionConfig(kernel_size=11),
}
found = {}
for name, mixer in mixers.items():
    model = probes.MixerRegressorConfig(token_size=task.token_size, mixer=mixer, width=16)
    brief = run.replace(num_steps=300, eval_every=None)
    found[name] = training.train_seeds(problem.replace(model=model, batch_size=64), brief)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for axis, metric, label in ((left, "loss", "½ MSE"), (right, "GD/cos", "cosine to one step")):
    axis.barh(list(found), [result.final(metric).mean() for result in found.values()])
    axis.set_xlabel(label)
left.axvline(trained.metrics["GD/loss"][0, 0], color="C1", linestyle="--")
plt.tight_layout()
plt.show()
