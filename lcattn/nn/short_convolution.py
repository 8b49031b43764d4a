"""The gated short convolution (BaseConv of BASED): cheap, exact, local mixing."""

import dataclasses
from typing import no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.layers import convolution_taps, projection
from lcattn.nn.mixer import Mixer, MixerConfig, check_hidden, check_stream
from lcattn.traits import Traits
from lcattn.typing import Array, Float, Hidden, Positions, SegmentIds


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvolutionState:
    """The last `kernel_size - 1` inputs of the convolution, `[B,W-1,inner]`."""

    inputs: Float[Array, "B w C"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvolutionConfig(MixerConfig):
    """BASED's BaseConv (arXiv 2402.18668): a short depth-wise convolution with a gate.

    Attributes:
      kernel_size: taps W.
      expand: the input projection has `expand * width` outputs, half convolved, half gate.
      implementation: passed to `lcattn.ops.short_convolution`.
    """

    kernel_size: int = 3
    expand: int = 4
    implementation: str | None = None

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("kernel_size", "expand")
        if self.width is not None and self.expand * self.width % 2:
            raise self.error("expand", f"an even expand * width (width={self.width})")

    def make(self, rngs: nnx.Rngs) -> "ShortConvolution":
        """Builds the mixer."""
        return ShortConvolution(self, rngs)


class ShortConvolution(Mixer):
    """`y = Wo (silu(conv(u)) * g) + bo` with `[u, g] = Wi x + bi` (Arora et al. 2024)."""

    op = "short_convolution"
    time = "T·W"

    def __init__(self, config: ShortConvolutionConfig, rngs: nnx.Rngs):
        """Args: `config`, with its width set; `rngs`, for the parameters."""
        self.config = config
        width = config.require_width()
        self.inner = config.expand * width // 2
        self.input = projection(
            config, width, 2 * self.inner, axes=("embed", "mlp"), rngs=rngs, use_bias=True
        )
        self.out = projection(
            config, self.inner, width, axes=("mlp", "embed"), rngs=rngs, is_output=True,
            use_bias=True,
        )  # fmt: skip
        self.taps = convolution_taps(config, self.inner, config.kernel_size, axis="mlp", rngs=rngs)

    @property
    def traits(self) -> Traits:
        """Causal, streaming, linear in the length."""
        return Traits(causal=True, streaming=True, subquadratic=True)

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences; `positions` do not matter."""
        del positions
        return self._mix(x, segment_ids=segment_ids)[0]

    def init_state(self, batch_size: int, max_length: int, dtype=None) -> ConvolutionState:
        """No inputs yet."""
        del max_length
        shape = (batch_size, self.config.kernel_size - 1, self.inner)
        return ConvolutionState(jnp.zeros(shape, dtype or self.config.dtype or "float32"))

    def extend(self, x: Hidden, state: ConvolutionState) -> tuple[Hidden, ConvolutionState]:
        """Continues each stream."""
        check_stream(x, state.inputs)
        y, inputs = self._mix(x, initial_state=state.inputs)
        return y, ConvolutionState(inputs.astype(state.inputs.dtype))

    def _mix(self, x: Array, **options) -> tuple[Array, Array]:
        check_hidden(x, self.config.require_width())
        u, gate = jnp.split(self.input(x), 2, axis=-1)
        convolved, state = ops.short_convolution(
            u, self.taps[...], return_state=True,
            implementation=self.config.implementation, **options,
        )  # fmt: skip
        return self.out(jax.nn.silu(convolved) * gate), state
