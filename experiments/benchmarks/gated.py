"""Recurrent states that forget: gated linear attention and the gated delta rule."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, override

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks import peers
from experiments.benchmarks.base import Cost, Implementation, Inputs, OpBenchmark
from lcattn import ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionBenchmark(OpBenchmark):
    """`gated_linear_attention`.

    Attributes:
      num_heads: N; as many key heads.
      head_dim: H, of the values.
      feature_dim: F, of queries and keys.
      decay: one gate a "channel" or a "head".
      max_recurrent: longest sequence for the token-by-token reference.
    """

    num_heads: int = 4
    head_dim: int = 64
    feature_dim: int = 64
    decay: Literal["channel", "head"] = "channel"
    max_recurrent: int = 1024

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("num_heads", "head_dim", "feature_dim", "max_recurrent")

    @property
    @override
    def op(self) -> str:
        return "gated_linear_attention"

    @override
    def shapes(self, length: int) -> Mapping[str, tuple[int, ...]]:
        lead = (self.batch_size, length, self.num_heads)
        return {
            "q": (*lead, self.feature_dim),
            "k": (*lead, self.feature_dim),
            "v": (*lead, self.head_dim),
            "log_decay": (*lead, self.feature_dim) if self.decay == "channel" else lead,
        }

    @override
    def inputs(self, length: int) -> Inputs:
        """Normal inputs; decays as GLA makes them of normal numbers."""
        inputs = super().inputs(length)
        return inputs | {"log_decay": jax.nn.log_sigmoid(inputs["log_decay"]) / 16}

    @override
    def reference(self, inputs: Inputs) -> Any:
        """The recurrence, written apart from the library's own forms."""
        return _recurrence(inputs, lambda state, k, v: v)

    @override
    def implementations(self) -> Mapping[str, Implementation]:
        op = getattr(ops, self.op)
        chunks = Implementation(functools.partial(op, implementation="xla"))
        reference = functools.partial(op, implementation="reference")
        return {
            "lcattn": Implementation(op),
            # Elsewhere that is "lcattn".
            **({"lcattn xla": chunks} if jax.default_backend() == "gpu" else {}),
            "lcattn reference": Implementation(reference, self.max_recurrent),
            **self._peers(),
        }

    def _peers(self) -> Mapping[str, Implementation]:
        return peers.gated_linear_attention(decay=self.decay)

    @override
    def forward_cost(self, length: int) -> Cost:
        # The recurrence: per number of the state, decay, write and read.
        return self._cost(length, flops=5)

    def _cost(self, length: int, flops: int) -> Cost:
        """Of so many operations a token and number of the state."""
        tokens = self.batch_size * length * self.num_heads
        numbers = sum(shape[-1] if len(shape) == 4 else 1 for shape in self.shapes(1).values())
        moved = self.element_bytes(tokens * (numbers + self.head_dim))
        return Cost(float(tokens * flops * self.feature_dim * self.head_dim), moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaRuleBenchmark(GatedLinearAttentionBenchmark):
    """`gated_delta_rule`; fields as in `GatedLinearAttentionBenchmark`, one gate a head."""

    decay: Literal["head"] = "head"

    @property
    @override
    def op(self) -> str:
        return "gated_delta_rule"

    @override
    def shapes(self, length: int) -> Mapping[str, tuple[int, ...]]:
        shapes = super().shapes(length)
        return {**shapes, "beta": shapes["log_decay"]}

    @override
    def inputs(self, length: int) -> Inputs:
        """Keys of norm 1 and strengths in (0, 1), for which the state is stable."""
        inputs = super().inputs(length)
        k = inputs["k"]
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        return inputs | {"k": k, "beta": jax.nn.sigmoid(inputs["beta"])}

    @override
    def reference(self, inputs: Inputs) -> Any:
        return _recurrence(inputs, lambda state, k, v: v - jnp.einsum("bnfh,bnf->bnh", state, k))

    @override
    def _peers(self) -> Mapping[str, Implementation]:
        return {}

    @override
    def forward_cost(self, length: int) -> Cost:
        return self._cost(length, flops=7)  # and what the key recalls


def _recurrence(inputs: Inputs, written: Any) -> Any:
    """S = e^g S, S = S + beta k written(S, k, v)ᵀ, o = Sᵀ q / sqrt(F)."""
    q, k, v, g = (inputs[name] for name in ("q", "k", "v", "log_decay"))
    beta = inputs.get("beta", jnp.ones(q.shape[:3], q.dtype))
    decay = jnp.broadcast_to(jnp.exp(g if g.ndim == 4 else g[..., None]), q.shape)

    def step(state, token):
        q, k, v, decay, beta = token
        state = decay[..., None] * state
        write = beta[..., None] * written(state, k, v)
        state = state + k[..., None] * write[..., None, :]
        return state, jnp.einsum("bnfh,bnf->bnh", state, q)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, decay, beta))
    zeros = jnp.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1]), q.dtype)
    out = lax.scan(step, zeros, tokens)[1]
    return jnp.moveaxis(out, 0, 1) * q.shape[-1] ** -0.5
