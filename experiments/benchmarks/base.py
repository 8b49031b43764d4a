"""What the benchmark driver needs to know of an op."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, override

import jax
import jax.numpy as jnp

from lcattn.config import Config

Inputs = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op, ours or a peer's.

    Attributes:
      run: called with the inputs as keywords, returns the output.
      max_length: longest sequence it is tried on; None: any. For forms whose memory is quadratic.
      framework: "torch" functions take and return torch tensors on the GPU.
      reference: its definition, called as `run` is, where it is not that of the benchmark.
    """

    run: Callable[..., Any]
    max_length: int | None = None
    framework: Literal["jax", "torch"] = "jax"
    reference: Callable[..., Any] | None = None


class Cost(NamedTuple):
    """The least work that computes an op.

    Attributes:
      flops: of the cheapest known form; a multiply-add counts as two.
      bytes: inputs read once, outputs written once.
    """

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpBenchmark(Config):
    """Sizes of one op to measure at; subclasses give its inputs, cost and implementations.

    Attributes:
      batch_size: B.
      dtype: of the inputs, e.g. "bfloat16".
      seed: of the normal inputs.
    """

    batch_size: int = 1
    dtype: str = "float32"
    seed: int = 0

    @override
    def validate(self) -> None:
        self.require_positive("batch_size")
        try:
            jnp.dtype(self.dtype)
        except TypeError:
            raise self.error("dtype", "the name of a dtype") from None

    @property
    def op(self) -> str:
        """The op's name in `lcattn.ops`."""
        raise NotImplementedError

    @property
    def baselines(self) -> tuple[str, ...]:
        """Implementations that the others are set beside; none: all beside all."""
        return ()

    @abc.abstractmethod
    def shapes(self, length: int) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the inputs, by keyword."""

    @abc.abstractmethod
    def reference(self, inputs: Inputs) -> Any:
        """The definition, in the precision of the inputs."""

    @abc.abstractmethod
    def implementations(self) -> Mapping[str, Implementation]:
        """What to compare, ours first. A peer that is not installed is left out."""

    @abc.abstractmethod
    def forward_cost(self, length: int) -> Cost:
        """The least work of one forward pass."""

    def cost(self, length: int, *, backward: bool) -> Cost:
        """The least work of a forward pass, or of a forward and a backward pass.

        The backward pass of a product of two arrays is two such products; inputs are read again,
        and the gradient of each is written.
        """
        flops, moved = self.forward_cost(length)
        return Cost(3 * flops, 3 * moved) if backward else Cost(flops, moved)

    def inputs(self, length: int) -> Inputs:
        """Normal inputs, the same for each implementation."""
        shapes = self.shapes(length)
        keys = jax.random.split(jax.random.key(self.seed), len(shapes))
        return {
            name: jax.random.normal(key, shape, jnp.dtype(self.dtype))
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def element_bytes(self, *counts: int) -> float:
        """Bytes of arrays of the given element counts in the benchmark's dtype."""
        return float(sum(counts) * jnp.dtype(self.dtype).itemsize)


def visible_pairs(length: int, window: int | None = None) -> int:
    """Query-key pairs that a causal mask of the given window leaves."""
    reach = min(window or length, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach
