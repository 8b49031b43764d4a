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
# # lcattn in ten minutes
#
# Attention mechanisms as plain JAX functions; the same mechanisms as layers that stream; a small
# language model built from them; and the experiment that shows what they trade: **recall against
# the size of the state**. Runs on a CPU in about two minutes; a GPU or TPU changes nothing but what
# the next cell installs.

# %% tags=["skip-execution"]
# In Colab: put the repository beside this notebook first, in a folder `lcattn` (clone or upload).
# On a GPU install "./lcattn[train,cuda]", on a TPU "./lcattn[train,tpu]": JAX and its plugin must
# be of one version.
# %pip install -q "./lcattn[train]"

# %%
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from flax import nnx

from lcattn import models, nn, ops, tasks, training

# %% [markdown]
# ## 1. An op in three lines
#
# Every op has one shape: queries `[B,T,N,H]`, keys and values `[B,S,K,H]`, and the same options.
# Here is attention whose weights are a Taylor series of exp (BASED), so that the past fits into a
# state of fixed size.

# %%
q, k, v = (
    jax.random.normal(key, (1, 512, 4, 16)) for key in jax.random.split(jax.random.key(0), 3)
)
out, state = ops.linear_attention(q, k, v, return_state=True)
out.shape, state.kv.shape

# %% [markdown]
# That state is all that a stream needs. However you cut a sequence, the result is the same:

# %%
half, state = ops.linear_attention(q[:, :300], k[:, :300], v[:, :300], return_state=True)
rest = ops.linear_attention(q[:, 300:], k[:, 300:], v[:, 300:], initial_state=state)
jnp.abs(jnp.concatenate([half, rest], axis=1) - out).max()

# %% [markdown]
# Packed documents do not see each other, and `implementation` names what runs (None: the best that
# serves the call; a name runs or says why it cannot):

# %%
documents = jnp.repeat(jnp.arange(4), 128)[None]
packed = ops.softmax_attention(q, k, v, segment_ids=documents, window=64)
alone = ops.softmax_attention(q[:, 128:256], k[:, 128:256], v[:, 128:256], window=64)
print(jnp.abs(packed[:, 128:256] - alone).max())
try:
    ops.softmax_attention(q, k, v, implementation="cudnn")
except ops.UnsupportedImplementationError as error:
    print(error)

# %% [markdown]
# ## 2. Swap a mixer in a model
#
# A model is a pattern of named mixers. Changing the architecture is changing the pattern.

# %%
MIXERS = {
    "conv": nn.ShortConvolutionConfig(),
    "softmax": nn.SoftmaxAttentionConfig(num_heads=2, position_encoding="nope"),
    "sliding": nn.SoftmaxAttentionConfig(num_heads=2, window=8, position_encoding="nope"),
    "linear": nn.LinearAttentionConfig(num_heads=2, feature_dim=8),
}


def language_model(*pattern: str) -> models.LMConfig:
    """A two-layer model of the given mixers."""
    return models.LMConfig(
        vocab_size=256,
        width=64,
        num_layers=2,
        pattern=pattern,
        mixers={name: MIXERS[name] for name in pattern},
        mlp_width=0,
        init_std=0.1,
    )


configs = {
    "softmax": language_model("conv", "softmax"),
    "sliding window": language_model("conv", "sliding"),
    "Taylor linear (BASED)": language_model("conv", "linear"),
}
for name, config in configs.items():
    model = config.make(nnx.Rngs(0))
    print(f"{name:22} state of one stream at 64 tokens: {model.state_bytes(64):>7,} bytes")

# %% [markdown]
# ## 3. Train on associative recall
#
# Multi-query associative recall (Arora et al. 2023): a row lists key-value pairs, then asks for
# some keys again. The answer is never near: a model must have remembered it.

# %%
mqar = tasks.MQARConfig(length=64, num_pairs=8, vocab_size=256, num_examples=20_000)
task = tasks.MQARTaskConfig(
    train=(mqar,),
    evaluation=(mqar.replace(num_examples=256),),
    data=tasks.DataConfig(batch_size=64, shuffle=True),
).make()
run = training.TrainConfig(
    num_steps=400,
    optimizer=training.OptimizerConfig(learning_rate=1e-2, warmup_steps=40),
    eval_every=50,
    log_every=25,
    stop_when={"length_64_pairs_8/accuracy": 0.99},
)
results = {}
for name, config in configs.items():
    with tempfile.TemporaryDirectory() as run_dir:
        results[name] = training.train(task, config, run, run_dir)
    print(name, {key: round(value, 3) for key, value in results[name].metrics.items()})

# %% [markdown]
# ## 4. The picture of this field
#
# Recall against the bytes a stream has to carry. A sliding window forgets what lies behind it; the
# linear layer keeps a summary of everything; softmax keeps everything itself.

# %%
figure, axes = plt.subplots(figsize=(6, 4))
for name, result in results.items():
    size = result.model.state_bytes(64)
    accuracy = result.metrics["length_64_pairs_8/accuracy"]
    axes.plot(size, accuracy, "o", markersize=10, label=name)
axes.set_xscale("log")
axes.set_xlabel("state of one stream (bytes)")
axes.set_ylabel("recall accuracy, 8 pairs in 64 tokens")
axes.set_ylim(-0.05, 1.05)
axes.legend()
plt.show()

# %% [markdown]
# ## 5. Generate
#
# `extend` takes any number of new tokens: the prompt at once, then one token at a time. `generate`
# does both under `jit`, so the cost of a token depends on the state alone.

# %%
model = results["Taylor linear (BASED)"].model
prompt = jnp.asarray(task.evaluation()["length_64_pairs_8"][0]["tokens"][:1, :32])
models.generate(model, prompt, 8, temperature=0.0)
