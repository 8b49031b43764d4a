"""A transformer of nothing but linear self-attention, as the papers train it."""

import dataclasses
from collections.abc import Sequence
from typing import override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.config import Config
from lcattn.probes.regression.attention import Kind, LSAWeights, attend
from lcattn.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSAConfig(Config):
    """Layers of linear self-attention on tokens `[x; y]`, without embedding, norms or MLPs.

    Attributes:
      token_size: E.
      num_layers: layers.
      num_heads: heads N of each, of size E.
      tied: all layers share their weights: a recurrent network.
      kind: "linear" or "softmax".
      causal: context tokens read only those before them (and themselves).
      init_scale: weights start with variance `init_scale / num_layers / fan_in`.
      clip: coordinates of tokens are cut off beyond ±clip after each layer. None: they are not.
    """

    token_size: int
    num_layers: int = 1
    num_heads: int = 1
    tied: bool = False
    kind: Kind = "linear"
    causal: bool = False
    init_scale: float = 0.002
    clip: float | None = None

    @override
    def validate(self) -> None:
        self.require_positive("token_size", "num_layers", "num_heads", "init_scale", "clip")

    def make(self, rngs: nnx.Rngs) -> "LSATransformer":
        """Builds the model."""
        return LSATransformer(self, rngs)


class LSALayer(nnx.Module):
    """The weights of one layer as parameters."""

    def __init__(self, config: LSAConfig, rngs: nnx.Rngs):
        """Args: `config`; `rngs`, for the parameters."""
        E, N = config.token_size, config.num_heads
        scale = config.init_scale / config.num_layers

        def param(*shape: int, inputs: tuple[int, ...]) -> nnx.Param:
            outputs = tuple(axis for axis in range(3) if axis not in inputs)
            init = nnx.initializers.variance_scaling(
                scale, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs
            )
            return nnx.Param(init(rngs.params(), shape), axes=(None,) * 3)

        self.query, self.key, self.value = (param(E, N, E, inputs=(0,)) for _ in range(3))
        self.out = param(N, E, E, inputs=(0, 1))

    @property
    def weights(self) -> LSAWeights:
        """As arrays."""
        return LSAWeights(self.query[...], self.key[...], self.value[...], self.out[...])


class LSATransformer(nnx.Module):
    """Predicts the label of the last token: minus its last coordinate after all layers."""

    def __init__(self, config: LSAConfig, rngs: nnx.Rngs):
        """Args: `config`; `rngs`, for the parameters."""
        self.config = config
        count = 1 if config.tied else config.num_layers
        self.layers = nnx.List([LSALayer(config, rngs) for _ in range(count)])

    @property
    def weights(self) -> list[LSAWeights]:
        """Of every layer, tied ones repeated."""
        layers = [layer.weights for layer in self.layers]
        return layers * self.config.num_layers if self.config.tied else layers

    def __call__(self, tokens: Float[Array, "B T E"]) -> Float[Array, "B"]:
        """The predictions for `[B,n+1,E]` tokens, the last of which is the query."""
        config = self.config
        return predict(
            self.weights, tokens, kind=config.kind, causal=config.causal, clip=config.clip
        )


def predict(
    layers: Sequence[LSAWeights],
    tokens: Float[Array, "B T E"],
    *,
    kind: Kind = "linear",
    causal: bool = False,
    clip: float | None = None,
) -> Float[Array, "B"]:
    """What layers with the given weights predict for the last token."""
    context, query = tokens[:, :-1], tokens[:, -1:]
    for layer in layers[:-1]:
        # Both from the old context. Only the query is asked of the last layer.
        moved = attend(layer, context, context, kind=kind, causal=causal)
        query = query + attend(layer, query, context, kind=kind)
        context = context + moved
        if clip is not None:
            context, query = (jnp.clip(x, -clip, clip) for x in (context, query))
    return -(query + attend(layers[-1], query, context, kind=kind))[:, -1, -1]


def roll_out(
    layer: LSAWeights, tokens: Float[Array, "B T E"], steps: int, damping: float | Array = 1.0
) -> Float[Array, "steps B"]:
    """The predictions of one layer applied again and again, only labels being updated.

    Each time the update is multiplied by `damping`, so that a layer that makes a gradient step
    makes many smaller ones.
    """

    def step(tokens: Array, _: None) -> tuple[Array, Array]:
        change = attend(layer, tokens, tokens[:, :-1])[..., -1]
        tokens = tokens.at[..., -1].add(damping * change)
        return tokens, -tokens[:, -1, -1]

    return jax.lax.scan(step, tokens, length=steps)[1]
