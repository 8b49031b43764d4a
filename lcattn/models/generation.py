"""Sampling from a language model through its streaming state."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcattn.errors import argument_error
from lcattn.models.lm import LM
from lcattn.ops.checks import check_size
from lcattn.typing import Array, Float, Int, PRNGKeyArray


def generate(
    model: LM,
    prompt: Int[Array, "B P"],
    num_tokens: int,
    *,
    rng: PRNGKeyArray | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "B L"]:
    """Continues each prompt by `num_tokens` tokens.

    The prompt is read by one call of `advance`, each token by one of `extend` under `lax.scan`; the
    cost of a token depends on the state only. Compiled once for each model structure and shape.

    Args:
      model: the language model.
      prompt: tokens `[B,P]`, P > 0.
      num_tokens: how many to add.
      rng: key to sample with; needed unless `temperature` is 0.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens only.
      top_p: sample among the likeliest tokens that together hold this probability (Holtzman et
        al. 2019, arXiv 1904.09751).

    Returns:
      `[B, P + num_tokens]`: prompts and their continuations.

    Raises:
      ValueError: for options out of range, or a missing `rng`.
    """
    check_size("num_tokens", num_tokens)
    if temperature < 0:
        raise argument_error("temperature", "a number of at least 0", temperature)
    if temperature > 0 and rng is None:
        raise argument_error("rng", "a key, unless temperature is 0", "None")
    if top_k is not None:
        check_size("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise argument_error("top_p", "a probability above 0", top_p)
    graph, parameters = nnx.split(model)
    return _generate(
        graph, parameters, prompt, jax.random.key(0) if rng is None else rng,
        num_tokens=num_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("graph", "num_tokens", "temperature", "top_k", "top_p")
)
def _generate(graph, parameters, prompt, rng, *, num_tokens, temperature, top_k, top_p):
    model = nnx.merge(graph, parameters)
    state = model.init_state(prompt.shape[0], prompt.shape[1] + num_tokens)
    h, state = model.advance(prompt, state)
    logits, _ = model.unembed(h[:, -1:])
    draw = functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)

    def step(carry, key):
        token, state = carry
        logits, state = model.extend(token[:, None], state)
        token = draw(logits[:, -1], key).astype(prompt.dtype)
        return (token, state), token

    keys = jax.random.split(rng, num_tokens)
    first = draw(logits[:, -1], keys[0]).astype(prompt.dtype)
    _, rest = lax.scan(step, (first, state), keys[1:])
    return jnp.concatenate([prompt, first[:, None], rest.T], axis=1)


def sample(
    logits: Float[Array, "B V"],
    key: PRNGKeyArray,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "B"]:
    """Draws one token a row; see `generate` for the options."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        # The likeliest token always stays: nothing comes before it.
        lowest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
