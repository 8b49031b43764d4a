"""The short causal convolution: bound by memory, so its floor is bytes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, override

import jax
import jax.numpy as jnp

from experiments.benchmarks.base import Cost, Implementation, Inputs, OpBenchmark
from lcattn.ops import short_convolution


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvolutionBenchmark(OpBenchmark):
    """`short_convolution`, beside XLA's own convolution.

    Attributes:
      width: D, channels.
      kernel_size: W, taps.
      max_grouped: longest sequence for XLA's grouped convolution, which is slow.
    """

    width: int = 256
    kernel_size: int = 3
    max_grouped: int = 4096

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("width", "kernel_size", "max_grouped")

    @property
    @override
    def op(self) -> str:
        return "short_convolution"

    @override
    def shapes(self, length: int) -> Mapping[str, tuple[int, ...]]:
        return {
            "x": (self.batch_size, length, self.width),
            "weight": (self.width, self.kernel_size),
        }

    @override
    def reference(self, inputs: Inputs) -> Any:
        return short_convolution(inputs["x"], inputs["weight"], implementation="reference")

    @override
    def implementations(self) -> Mapping[str, Implementation]:
        return {
            "lcattn": Implementation(short_convolution),
            "lcattn reference": Implementation(
                functools.partial(short_convolution, implementation="reference")
            ),
            "jax.lax.conv": Implementation(_xla_convolution, self.max_grouped),
        }

    @override
    def forward_cost(self, length: int) -> Cost:
        count = self.batch_size * length * self.width
        return Cost(2.0 * count * self.kernel_size, self.element_bytes(2 * count))


def _xla_convolution(x: jax.Array, weight: jax.Array) -> jax.Array:
    width, taps = weight.shape
    return jax.lax.conv_general_dilated(
        x, jnp.transpose(weight)[:, None, :], window_strides=(1,), padding=[(taps - 1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=width,
    )  # fmt: skip
