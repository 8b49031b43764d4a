"""Selective attention (SSA) as a token mixer: temperatures learned from token and position."""

import dataclasses
from typing import Literal, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.nn.layers import projection
from lcattn.nn.softmax_attention import SoftmaxAttention, SoftmaxAttentionConfig
from lcattn.ops.selective_attention import temper
from lcattn.typing import Array, Float, Hidden, Int, Positions

# Published initial values of the parameter behind a; "raw" starts at 0, the identity.
_INITIAL = {"raw": 0.0, "exp": 2.0, "sigmoid": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveAttentionConfig(SoftmaxAttentionConfig):
    """Selective attention, SSA (arXiv 2411.12892): softmax with learned temperatures of tokens.

    At its defaults the layer starts as `SoftmaxAttention` to the bit, so that it can replace one
    in a trained model.

    Attributes:
      base: the constant term of a query's temperature. 1/T gives TempScale, 0 with a position term
        scalable softmax.
      position: how the coefficient a of ln(n) comes from its parameter b, n being the number of
        keys seen: "raw" (a = b), "exp" (a = exp(-exp(b)), the published code), "sigmoid"
        (a = 1 / (1 + exp(-b)), third parties' reading of the paper; a = 0.5 at first, which breaks
        a trained model), or None for no such term.
      position_init: initial b. None: 0 for "raw" and "sigmoid", 2 for "exp" (a = 6e-4; the
        published GPT-2 runs use 1.5).
      position_per_head: one b a head, rather than one for the layer.
      query_gate: adds tanh(w · gelu(z)) to a query's temperature, with z its projection.
      value_gate: gives each value the temperature 1 + tanh(w · gelu(z)), with z its projection.
      gate_per_head: a gate a head from that head's z, rather than one for the layer from all.
      gate_hidden: size of a hidden layer of the gates' own that takes the place of z. None: the
        weights are shared with the projections, as in the paper's small variant.
      gate_init: "zeros", where the gates start closed (tanh = 0), or "xavier", from scratch.
    """

    base: float = 1.0
    position: Literal["raw", "exp", "sigmoid"] | None = "raw"
    position_init: float | None = None
    position_per_head: bool = False
    query_gate: bool = True
    value_gate: bool = True
    gate_per_head: bool = True
    gate_hidden: int | None = None
    gate_init: Literal["zeros", "xavier"] = "zeros"

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("gate_hidden")

    @override
    def make(self, rngs: nnx.Rngs) -> "SelectiveAttention":
        """Builds the mixer."""
        return SelectiveAttention(self, rngs)


class SelectiveAttention(SoftmaxAttention):
    """`softmax_attention(tau_q(x, n) q, k, tau_v(x) v)`, with the parameters of that layer.

    Values are cached scaled, so that a step costs what one of softmax attention costs.
    """

    op = "selective_attention"

    def __init__(self, config: SelectiveAttentionConfig, rngs: nnx.Rngs):
        """Args: `config`, with its width set; `rngs`, for the parameters."""
        super().__init__(config, rngs)
        N, K = config.num_heads, config.kv_heads
        self.base = config.base
        self.position = PositionTerm(config, rngs) if config.position else None
        self.query_gate = TokenGate(config, N, rngs) if config.query_gate else None
        self.value_gate = TokenGate(config, K, rngs) if config.value_gate else None

    @override
    def _heads(self, x: Hidden, positions: Positions, lengths: Int[Array, "B T"]):
        q, k, v = self.project(x)
        temperature = jnp.full((1, 1, 1), self.base, jnp.float32)
        if self.position is not None:
            seen = (
                lengths if self.config.window is None else jnp.minimum(lengths, self.config.window)
            )
            temperature += self.position(seen)
        if self.query_gate is not None:
            temperature += self.query_gate(x, q)
        if self.value_gate is not None:
            v = temper(v, jnp.broadcast_to(1 + self.value_gate(x, v), v.shape[:3]))
        q_encoded, k = self._encode(q, k, positions)
        return temper(q_encoded, jnp.broadcast_to(temperature, q.shape[:3])), k, v


class PositionTerm(nnx.Module):
    """`a ln(n)`, with one coefficient for the layer or one a head."""

    def __init__(self, config: SelectiveAttentionConfig, rngs: nnx.Rngs):
        """Args: `config`; `rngs` is not used, since the start is given."""
        del rngs
        self.kind = config.position or "raw"
        initial = config.position_init
        initial = _INITIAL[self.kind] if initial is None else initial
        shape = (config.num_heads if config.position_per_head else 1,)
        # Always float32: exp(-exp(b)) is too steep for less.
        self.parameter = nnx.Param(jnp.full(shape, initial, jnp.float32), axes=(None,))

    def coefficient(self) -> Float[Array, "n"]:
        """a, `[1]` or `[N]`."""
        b = self.parameter[...]
        if self.kind == "exp":
            return jnp.exp(-jnp.exp(b))
        return jax.nn.sigmoid(b) if self.kind == "sigmoid" else b

    def __call__(self, lengths: Int[Array, "B T"]) -> Float[Array, "B T n"]:
        """From the number of keys that each query sees, at least 1."""
        return self.coefficient() * jnp.log(lengths.astype(jnp.float32))[..., None]


class TokenGate(nnx.Module):
    """`tanh(w · gelu(z))` in (-1, 1), where z is the layer's own projection or a hidden layer."""

    def __init__(self, config: SelectiveAttentionConfig, num_heads: int, rngs: nnx.Rngs):
        """Args: `config`; `num_heads` of the gated heads; `rngs`, for the parameters."""
        self.per_head = config.gate_per_head
        if config.gate_hidden is None:
            self.hidden = None
            shape = (num_heads, config.head_size)
        else:
            self.hidden = projection(
                config, config.require_width(), config.gate_hidden, axes=("embed", None), rngs=rngs
            )
            shape = (num_heads if self.per_head else 1, config.gate_hidden)
        dtype = jnp.dtype(config.param_dtype or "float32")
        if config.gate_init == "xavier":
            weight = nnx.initializers.xavier_uniform()(rngs.params(), shape, dtype)
        else:
            weight = jnp.zeros(shape, dtype)
        self.weight = nnx.Param(weight, axes=(None, None))

    def __call__(self, x: Hidden, z: Float[Array, "B T N H"]) -> Float[Array, "B T n"]:
        """The gate of each token `[B,T,N]`, or `[B,T,1]` for the layer."""
        weight = self.weight[...].astype(jnp.float32)
        if self.hidden is not None:
            activation = jax.nn.gelu(self.hidden(x).astype(jnp.float32))
            return jnp.tanh(jnp.einsum("btm,nm->btn", activation, weight))
        activation = jax.nn.gelu(z.astype(jnp.float32))
        products = jnp.einsum("btnh,nh->btn", activation, weight)
        return jnp.tanh(products if self.per_head else products.sum(axis=-1, keepdims=True))
