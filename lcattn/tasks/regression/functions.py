"""Regression beyond linear functions: sine waves, and a fixed random network under a linear map."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp

from lcattn.tasks.regression.batch import Regression, RegressionTask
from lcattn.typing import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class SineRegressionConfig(RegressionTask):
    r"""Sine waves :math:`y = a \sin(x + \phi)` (Finn et al. 2017; von Oswald et al. 2022).

    The published code draws amplitude and phase from one key, so that one determines the other;
    here they are independent. Its text has amplitudes up to 5, its code and its losses up to 0.5.

    Attributes:
      dim: 1.
      x_range: inputs are uniform on (-x_range, x_range).
      amplitudes: least and largest amplitude.
    """

    dim: int = 1
    x_range: float = 5.0
    amplitudes: tuple[float, float] = (0.1, 0.5)

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("x_range")
        if self.dim != 1:
            raise self.error("dim", "1")
        if not 0 <= self.amplitudes[0] <= self.amplitudes[1]:
            raise self.error("amplitudes", "two values that rise from 0 or more")

    @override
    def sample(self, key: PRNGKeyArray, count: int) -> Regression:
        """Draws `count` rows."""
        x_key, amplitude_key, phase_key = jax.random.split(key, 3)
        least, most = self.amplitudes
        x = jax.random.uniform(
            x_key, (count, self.num_examples + 1), minval=-self.x_range, maxval=self.x_range
        )
        amplitude = jax.random.uniform(amplitude_key, (count, 1), minval=least, maxval=most)
        phase = jax.random.uniform(phase_key, (count, 1), maxval=jnp.pi)
        y = amplitude * jnp.sin(x + phase)
        return Regression(x[:, :-1, None], y[:, :-1], x[:, -1:], y[:, -1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkRegressionConfig(RegressionTask):
    r"""Linear functions of a fixed representation, :math:`y = w^\top \Phi(x) + \sigma\varepsilon`.

    :math:`\Phi` is a random network with tanh units, the same in every row, and w is new in each
    (Guo et al. 2023, arXiv 2310.10616). Inputs are standard normal.

    Attributes:
      features: outputs of the network.
      hidden: units of each of its hidden layers.
      depth: hidden layers.
      network_seed: from which its weights are drawn.
      label_noise: standard deviation of the noise on labels; the target has none.
    """

    features: int = 8
    hidden: int = 32
    depth: int = 1
    network_seed: int = 0
    label_noise: float = 0.0

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("features", "hidden", "depth")
        if self.label_noise < 0:
            raise self.error("label_noise", "a value of at least 0")

    def represent(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows F"]:
        """The representation of inputs."""
        sizes = (self.dim, *(self.hidden,) * self.depth, self.features)
        keys = jax.random.split(jax.random.key(self.network_seed), len(sizes) - 1)
        for key, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True):
            x = jnp.tanh(x @ jax.random.normal(key, (inputs, outputs)) * inputs**-0.5)
        return x

    @override
    def sample(self, key: PRNGKeyArray, count: int) -> Regression:
        """Draws `count` rows."""
        x_key, w_key, noise_key = jax.random.split(key, 3)
        x = jax.random.normal(x_key, (count, self.num_examples + 1, self.dim))
        w = jax.random.normal(w_key, (count, self.features))
        values = jnp.einsum("bnf,bf->bn", self.represent(x), w)
        noise = self.label_noise * jax.random.normal(noise_key, values[:, :-1].shape)
        return Regression(x[:, :-1], values[:, :-1] + noise, x[:, -1], values[:, -1])
