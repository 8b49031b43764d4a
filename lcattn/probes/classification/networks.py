"""The networks of Reddy (2024), arXiv 2312.03002, that learn to label items in context."""

import dataclasses
from typing import Any, NamedTuple, Protocol, override, runtime_checkable

import jax
import jax.numpy as jnp

from lcattn.config import Config
from lcattn.tasks.item_label import ItemLabelConfig
from lcattn.typing import Array, Float, PRNGKeyArray

Params = Any
"""Nested dictionaries and lists of arrays."""


class Reading(NamedTuple):
    """What a network makes of one sequence of t = 2N + 1 tokens.

    Attributes:
      logits: `[L]`.
      first: `[t,t]`, attention of the first layer.
      second: `[t]`, attention of the target in the second layer.
    """

    logits: Float[Array, "L"]
    first: Float[Array, "t t"]
    second: Float[Array, "t"]


@runtime_checkable
class Network(Protocol):
    """A network as functions of its parameters; a `Config`, and so hashable."""

    def init(self, key: PRNGKeyArray, data: ItemLabelConfig) -> Params:
        """New parameters for sequences of `data`."""
        ...

    def read(self, params: Params, data: ItemLabelConfig, tokens: Float[Array, "t d"]) -> Reading:
        """One sequence."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionNetwork(Config):
    """Two layers of attention with one head each, and an MLP on the last token.

    `h += softmax(h Q (h K)') h V` without norms, biases, output projection or the usual
    `1/sqrt(d)`; then three ReLU layers, each with one scalar bias, and a linear one. Only the last
    token of the second layer is computed: nothing else reaches the loss.

    Attributes:
      mlp_width: of the ReLU layers. None: the size of a token, as in the paper (128).
    """

    mlp_width: int | None = None

    @override
    def validate(self) -> None:
        self.require_positive("mlp_width")

    def init(self, key: PRNGKeyArray, data: ItemLabelConfig) -> Params:
        """Projections N(0, 1/D); the MLP as in `init_mlp`."""
        d = data.width
        first_key, second_key, mlp_key = jax.random.split(key, 3)

        def layer(key: PRNGKeyArray) -> dict[str, Array]:
            names = ("query", "key", "value")
            shape, std = (d, d), data.content_size**-0.5
            keys = jax.random.split(key, len(names))
            return {n: std * jax.random.normal(k, shape) for n, k in zip(names, keys, strict=True)}

        mlp = init_mlp(mlp_key, d, self.mlp_width or d, data.num_labels)
        return {"first": layer(first_key), "second": layer(second_key), "mlp": mlp}

    def read(self, params: Params, data: ItemLabelConfig, tokens: Float[Array, "t d"]) -> Reading:
        """One sequence."""
        del data
        first, second = params["first"], params["second"]
        scores = (tokens @ first["query"]) @ (tokens @ first["key"]).T
        attention = causal_softmax(scores)
        h = tokens + attention @ (tokens @ first["value"])
        last = jax.nn.softmax((h[-1] @ second["query"]) @ (h @ second["key"]).T)
        out = h[-1] + last @ (h @ second["value"])
        return Reading(apply_mlp(params["mlp"], out), attention, last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoParameterNetwork(Config):
    """An induction head with two parameters and an MLP: all that the abrupt change needs.

    With contents c of the tokens, and each layer left with the one thing it has to learn::

        first[i, j] = softmax over j <= i of (beta1 · [j = i - 1])
        u_i         = sum_j first[i, j] c_j
        second[j]   = softmax over j of (beta2 · <c_T, u_j>)

    The MLP reads c_T and sum_j second[j] c_j. Both beta start at 0. The paper's abstract and
    reviews describe this network; its formula is reconstructed here.

    Attributes:
      mlp_width: of the three ReLU layers.
    """

    mlp_width: int = 128

    @override
    def validate(self) -> None:
        self.require_positive("mlp_width")

    def init(self, key: PRNGKeyArray, data: ItemLabelConfig) -> Params:
        """Both beta at 0."""
        mlp = init_mlp(key, 2 * data.content_size, self.mlp_width, data.num_labels)
        return {"beta1": jnp.zeros(()), "beta2": jnp.zeros(()), "mlp": mlp}

    def read(self, params: Params, data: ItemLabelConfig, tokens: Float[Array, "t d"]) -> Reading:
        """One sequence; places are not used."""
        content = tokens[:, data.num_places :]
        t = len(content)
        attention = causal_softmax(params["beta1"] * jnp.eye(t, k=-1))
        mixed = attention @ content
        last = jax.nn.softmax(params["beta2"] * mixed @ content[-1])
        inputs = jnp.concatenate([content[-1], last @ content])
        return Reading(apply_mlp(params["mlp"], inputs), attention, last)


def init_mlp(key: PRNGKeyArray, inputs: int, width: int, outputs: int) -> Params:
    """Three ReLU layers and a linear one: N(0, 2/fan-in) and N(0, 1/width), scalar biases."""
    keys = jax.random.split(key, 4)
    layers = []
    for layer_key, size in zip(keys, (inputs, width, width), strict=False):
        weight_key, bias_key = jax.random.split(layer_key)
        weight = (2 / size) ** 0.5 * jax.random.normal(weight_key, (size, width))
        layers.append({"weight": weight, "bias": size**-0.5 * jax.random.normal(bias_key)})
    return {"layers": layers, "head": width**-0.5 * jax.random.normal(keys[3], (width, outputs))}


def apply_mlp(params: Params, x: Float[Array, "d"]) -> Float[Array, "L"]:
    """The MLP of `init_mlp`."""
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer["weight"] + layer["bias"])
    return x @ params["head"]


def causal_softmax(scores: Float[Array, "t t"]) -> Float[Array, "t t"]:
    """Each row over the columns up to its own."""
    seen = jnp.tri(len(scores), dtype=bool)
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
