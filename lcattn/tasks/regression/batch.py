"""Rows of examples with a query, and the two ways in which models read them."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp

from lcattn.config import Config
from lcattn.typing import Array, Float, PRNGKeyArray


@no_type_check  # JAX also fills it with shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Regression:
    """B functions, each seen at n points and asked for at one more.

    Attributes:
      x: `[B,n,d]` inputs.
      y: `[B,n]` labels, with whatever noise the task has.
      query: `[B,d]` the input asked for.
      target: `[B]` the value of the function there, without noise.
    """

    x: Float[Array, "B n d"]
    y: Float[Array, "B n"]
    query: Float[Array, "B d"]
    target: Float[Array, "B"]

    def tokens(self) -> Float[Array, "B n+1 d+1"]:
        """One token a pair, `[x_i; y_i]`, and `[query; 0]` last (von Oswald et al. 2022)."""
        pairs = jnp.concatenate([self.x, self.y[..., None]], axis=-1)
        question = jnp.pad(self.query, ((0, 0), (0, 1)))[:, None]
        return jnp.concatenate([pairs, question], axis=1)

    def stream(self) -> Float[Array, "B 2n+1 d+1"]:
        """Inputs and labels as tokens of their own (Akyürek et al. 2022).

        `[0; x_1], [y_1; 0], ..., [0; x_n], [y_n; 0], [0; query]`: a causal model says at the
        position of each input what it takes its label for.
        """
        inputs = jnp.concatenate([self.x, self.query[:, None]], axis=1)
        inputs = jnp.pad(inputs, ((0, 0), (0, 0), (1, 0)))
        labels = jnp.pad(self.y[..., None], ((0, 0), (0, 1), (0, inputs.shape[-1] - 1)))
        both = jnp.stack([inputs, labels], axis=2)
        return both.reshape(len(both), -1, inputs.shape[-1])[:, :-1]

    def first(self, count: int | Array) -> "Regression":
        """The same with only the first `count` examples; the others are zeros.

        An example of zeros moves neither a least-squares solution nor a gradient.
        """
        seen = jnp.arange(self.x.shape[1]) < count
        return dataclasses.replace(
            self, x=jnp.where(seen[:, None], self.x, 0), y=jnp.where(seen, self.y, 0)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionTask(Config):
    """What draws regressions; `sample` is left open.

    Attributes:
      dim: size d of an input.
      num_examples: labelled examples n in a row.
    """

    dim: int = 10
    num_examples: int = 10

    def validate(self) -> None:
        """Sizes are at least 1."""
        self.require_positive("dim", "num_examples")

    @property
    def token_size(self) -> int:
        """Size of a token, `d + 1`."""
        return self.dim + 1

    def sample(self, key: PRNGKeyArray, count: int) -> Regression:
        """Draws `count` rows, each with a function of its own."""
        raise NotImplementedError
