"""The few layers that mixers and models share, each parameter named by its logical axes.

Logical axes ("embed", "heads", "mlp", "vocab", "channels") are metadata of the parameters; the
training room maps them to the axes of a device mesh (`lcattn.training.mesh`).
"""

import dataclasses
from typing import Any, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.config import Config
from lcattn.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig(Config):
    """What every layer needs to know. A model fills the fields left at None (`inherit`).

    Attributes:
      width: model width D.
      dtype: compute dtype, e.g. "bfloat16". None: "float32".
      param_dtype: dtype in which parameters are kept. None: "float32".
      init_std: standard deviation of the normal initialiser of projections. None: 0.02.
      output_init_std: the same for projections into the residual stream. None: `init_std`.
    """

    width: int | None = None
    dtype: str | None = None
    param_dtype: str | None = None
    init_std: float | None = None
    output_init_std: float | None = None

    @override
    def validate(self) -> None:
        self.require_positive("width", "init_std", "output_init_std")
        for field in ("dtype", "param_dtype"):
            value = getattr(self, field)
            if value is not None and not _is_float_dtype(value):
                raise self.error(field, "the name of a floating-point dtype")

    def inherit[C: "LayerConfig"](self: C, parent: "LayerConfig") -> C:
        """A copy in which each field that is None takes the parent's value."""
        fields: dict[str, Any] = {
            f.name: getattr(parent, f.name) for f in dataclasses.fields(LayerConfig)
        }
        return self.replace(**{k: v for k, v in fields.items() if getattr(self, k) is None})

    def require_width(self) -> int:
        """The width, which a layer cannot be built without."""
        if self.width is None:
            raise self.error("width", "the model width")
        return self.width


def _is_float_dtype(name: str) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False


def projection(
    config: LayerConfig,
    inputs: int,
    outputs: int,
    *,
    axes: tuple[str | None, str | None],
    rngs: nnx.Rngs,
    is_output: bool = False,
    use_bias: bool = False,
) -> nnx.Linear:
    """A dense layer with the config's dtypes and normal initialiser; biases start at 0."""
    std = config.init_std or 0.02
    if is_output:
        std = config.output_init_std or std
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=jnp.dtype(config.dtype or "float32"),
        param_dtype=jnp.dtype(config.param_dtype or "float32"),
        kernel_init=nnx.initializers.normal(std),
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis, multiplied in this order.

    XLA then makes one kernel for a GPU, which reads x once. Of `x * (scale / rms(x))`, as Flax has
    it, it makes two or three: a step of BASED has 73 norms, each of a few microseconds.
    """

    def __init__(self, size: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Args: `size` of the axis; `epsilon`, added to the mean square; `dtype` of the output."""
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (size,)), axes=(None,))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Array) -> Array:
        """`[..., size]`; all but the output is float32, or wider if `x` is."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...]).astype(self.dtype)


def rms_norm(size: int, *, dtype: str | None, rngs: nnx.Rngs) -> RMSNorm:
    """RMSNorm over the last axis with epsilon 1e-5; statistics in float32."""
    return RMSNorm(size, epsilon=1e-5, dtype=jnp.dtype(dtype or "float32"), rngs=rngs)


def layer_norm(size: int, *, dtype: str | None, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis with epsilon 1e-5; statistics in float32."""
    metadata = {"axes": (None,)}
    return nnx.LayerNorm(
        size, epsilon=1e-5, dtype=jnp.dtype(dtype or "float32"), scale_metadata=metadata,
        bias_metadata=metadata, rngs=rngs,
    )  # fmt: skip


def split_heads(x: Array, num_heads: int) -> Array:
    """`[B,T,N·H] -> [B,T,N,H]`."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def merge_heads(x: Array) -> Array:
    """`[B,T,N,H] -> [B,T,N·H]`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def convolution_taps(
    config: LayerConfig, channels: int, kernel_size: int, *, axis: str, rngs: nnx.Rngs
) -> nnx.Param:
    """Taps `[channels,W]` of a depth-wise convolution, uniform within ±W^-0.5."""
    bound = kernel_size**-0.5
    dtype = jnp.dtype(config.param_dtype or "float32")
    taps = jax.random.uniform(rngs.params(), (channels, kernel_size), dtype, -bound, bound)
    return nnx.Param(taps, axes=(axis, None))


def unit_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """`x / sqrt(|x|² + epsilon)` over the last axis, in float32; zeros stay zeros."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(squares + epsilon)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """The gated MLP `W3 (silu(W1 x) * W2 x)` (Shazeer 2020, arXiv 2002.05202), without biases."""

    def __init__(self, config: LayerConfig, hidden: int, rngs: nnx.Rngs):
        """Args: `config` for width, dtypes and initialiser; `hidden`, the inner size."""
        width = config.require_width()
        self.gate = projection(config, width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.up = projection(config, width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.down = projection(
            config, hidden, width, axes=("mlp", "embed"), rngs=rngs, is_output=True
        )

    def __call__(self, x: Array) -> Array:
        """`[..., D] -> [..., D]`."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
