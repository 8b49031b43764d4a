"""Models for regression in context: one mixer of the library, and LSA behind an embedding."""

import dataclasses
from typing import Any, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.config import Config
from lcattn.nn import MixerConfig
from lcattn.nn.layers import LayerConfig, projection
from lcattn.probes.regression.constructions import gradient_step
from lcattn.probes.regression.transformer import LSAConfig, LSALayer, predict
from lcattn.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerRegressorConfig(Config):
    """One layer of any mechanism between a linear embedding and a linear read-out.

    Both are linear and without bias, so for linear attention without a normaliser the model is one
    layer of LSA and no more: `W_out P W_V W_in` and `W_inᵀ W_Kᵀ W_Q W_in` are products like any
    others, and minus the last coordinate is one of the read-outs. A mechanism that needs room (an
    even head size, several heads, a norm) gets it, and nothing but the mechanism mixes tokens.

    Attributes:
      token_size: E.
      mixer: the mechanism. Fields left at None are filled from here.
      width: D.
      init_std: standard deviation of all projections. None: `width ** -0.5`.
    """

    token_size: int
    mixer: MixerConfig
    width: int = 32
    init_std: float | None = None

    @override
    def validate(self) -> None:
        self.require_positive("token_size", "width", "init_std")

    @property
    def layer(self) -> LayerConfig:
        """What all layers share."""
        return LayerConfig(width=self.width, init_std=self.init_std or self.width**-0.5)

    def make(self, rngs: nnx.Rngs) -> "MixerRegressor":
        """Builds the model."""
        return MixerRegressor(self, rngs)


class MixerRegressor(nnx.Module):
    """`W_out (h + mixer(h))` at the last token, with `h = W_in e`."""

    def __init__(self, config: MixerRegressorConfig, rngs: nnx.Rngs):
        """Args: `config`; `rngs`, for the parameters."""
        layer, width = config.layer, config.width
        self.embed = projection(layer, config.token_size, width, axes=(None, "embed"), rngs=rngs)
        self.mixer = config.mixer.inherit(layer).make(rngs)
        self.head = projection(layer, width, 1, axes=("embed", None), rngs=rngs)

    def __call__(self, tokens: Float[Array, "B T E"]) -> Float[Array, "B"]:
        """The predictions for `[B,n+1,E]` tokens, the last of which is the query."""
        h = self.embed(tokens)
        return self.head((h + self.mixer(h))[:, -1])[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddedLSAConfig(Config):
    """An embedding and an MLP on each token, then one layer of linear self-attention.

    The MLP can hold a representation on which the attention regresses linearly (von Oswald et al.
    2022, section 4).

    Attributes:
      token_size: E.
      width: D of the embedding, whose last coordinate is the label's.
      hidden: units of the MLP.
      frozen: the attention is the construction of a gradient step, of which only the rate is
        learned: gradient descent on a learned representation, to compare with.
    """

    token_size: int = 2
    width: int = 40
    hidden: int = 160
    frozen: bool = False

    @override
    def validate(self) -> None:
        self.require_positive("token_size", "width", "hidden")

    def make(self, rngs: nnx.Rngs) -> "EmbeddedLSA":
        """Builds the model."""
        return EmbeddedLSA(self, rngs)


class EmbeddedLSA(nnx.Module):
    """`e = W x; e += MLP(e)`, and minus the last coordinate after one layer of LSA."""

    def __init__(self, config: EmbeddedLSAConfig, rngs: nnx.Rngs):
        """Args: `config`; `rngs`, for the parameters."""
        self.config = config
        width, hidden = config.width, config.hidden
        self.embed = nnx.Linear(config.token_size, width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)
        self.attention: Any = None if config.frozen else _lsa(width, rngs)
        self.rate = nnx.Param(jnp.ones(()), axes=()) if config.frozen else None

    def __call__(self, tokens: Float[Array, "B T E"]) -> Float[Array, "B"]:
        """The predictions for `[B,n+1,E]` tokens, the last of which is the query."""
        e = self.embed(tokens)
        e = e + self.down(jax.nn.gelu(self.up(e)))
        if self.rate is None:
            return predict([self.attention.weights], e)
        n = tokens.shape[1] - 1
        return predict([gradient_step(self.config.width - 1, self.rate[...], n)], e)


def _lsa(width: int, rngs: nnx.Rngs) -> LSALayer:
    return LSALayer(LSAConfig(token_size=width), rngs)
