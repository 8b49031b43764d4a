"""What the suite is told about a mechanism."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.nn import MixerConfig

Sizes = Mapping[str, int]
Inputs = Mapping[str, Any]  # NumPy or JAX arrays by name

_SIZES = {"B": 2, "N": 4, "K": 2, "H": 8, "D": 6}
_VALUE_TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 5e-3, "float16": 1e-3}
_GRADIENT_TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OpCase:
    """An op with some options, and what it must equal.

    Attributes:
      name: for ids and errors, such as "softmax_attention[window=5]".
      op: obeys the op contract; called as `op(**inputs, **options, segment_ids=..., causal=...,
        implementation=...)`.
      oracle: the definition as a loop over tokens, `oracle(inputs, segment_ids, *, causal)`, on
        float64 NumPy arrays.
      inputs: axes of each differentiable input in the letters of `lcattn.typing`, space-separated.
        They say which inputs have a batch (`B`), are cut at documents (`T`), hold shared key heads
        (`K`) or can be spread over a mesh.
      output: axes of the output.
      options: passed to every call.
      draw: for an input that is not standard normal, `draw[name](rng, shape)`.
      sizes: of axes other than T, where the defaults don't fit.
      implementations: their names, the plainest first: gradients of the others are held against
        its, and its against finite differences of the oracle. The last one, which should be what
        `implementation=None` runs, goes through more sizes and JAX's transformations.
      is_causal: earlier outputs do not depend on later tokens; False for published forms that leak.
      bidirectional: also takes `causal=False`.
      stateful: takes `initial_state` and `return_state`.
      chunk: a length at which the computation changes its course; lengths around it are tried.
      widest_dtype: "float64", or "float32" for kernels that know no wider one. Values and
        gradients are compared in it.
      is_variant: options of an op whose sizes, dtypes and transformations another case checks, and
        whose lengths around a chunk.
      value_tolerance, gradient_tolerance: largest relative RMS error by dtype.
    """

    name: str
    op: Callable[..., Any]
    oracle: Callable[..., np.ndarray]
    inputs: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"q": "B T N H", "k": "B T K H", "v": "B T K H"}
    )
    output: str = "B T N H"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draw: Mapping[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = (
        dataclasses.field(default_factory=dict)
    )
    sizes: Sizes = dataclasses.field(default_factory=dict)
    implementations: Sequence[str | None] = ("reference", "xla")
    is_causal: bool = True
    bidirectional: bool = False
    stateful: bool = False
    chunk: int = 8
    widest_dtype: str = "float64"
    is_variant: bool = False
    value_tolerance: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: _VALUE_TOLERANCE
    )
    gradient_tolerance: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: _GRADIENT_TOLERANCE
    )

    def sizes_at(self, length: int, **sizes: int) -> Sizes:
        """Sizes of all axes of the inputs, for sequences of `length` tokens."""
        known = {**_SIZES, **self.sizes, **sizes, "T": length}
        letters = dict.fromkeys(" ".join(self.inputs.values()).split())
        return {letter: known[letter] for letter in letters}

    def make_inputs(self, sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
        """Float64 inputs, the same for the same sizes and seed."""
        rng = np.random.default_rng(seed)
        inputs = {}
        for name, axes in self.inputs.items():
            shape = tuple(sizes[letter] for letter in axes.split())
            inputs[name] = self.draw.get(name, np.random.Generator.standard_normal)(rng, shape)
        return inputs

    def axis(self, name: str, letter: str) -> int | None:
        """Where an input has an axis, or None."""
        letters = self.inputs[name].split()
        return letters.index(letter) if letter in letters else None

    def __call__(self, inputs: Mapping[str, jax.Array], **options: Any) -> Any:
        """Calls the op; `causal` is passed on only where it is False."""
        if options.pop("causal", True) is False:
            options["causal"] = False
        return self.op(**inputs, **self.options, **options)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MixerCase:
    """A mixer, and how closely it must keep its promises.

    Attributes:
      name: for ids and errors.
      config: builds the mixer; its width must be set.
      chunk: a length at which the computation changes its course.
      is_variant: options of a mixer whose dtypes, memory and bridges another case checks.
      tolerance: largest relative RMS error of streaming and packing, in float32.
      low_precision_tolerance: the same of the mixer in bfloat16 against the one in float32.
    """

    name: str
    config: MixerConfig
    chunk: int = 8
    is_variant: bool = False
    tolerance: float = 1e-5
    low_precision_tolerance: float = 2e-2

    @property
    def width(self) -> int:
        """D."""
        return self.config.require_width()

    def make_input(self, length: int, batch: int = 2, seed: int = 0) -> jax.Array:
        """Standard normal `[B,T,D]` in float32."""
        shape = (batch, length, self.width)
        return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def spell(sizes: Sizes) -> str:
    """Sizes as an id: `B2-T17-N4`."""
    return "-".join(f"{letter}{size}" for letter, size in sizes.items())
