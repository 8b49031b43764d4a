"""All mechanisms on the same queries, keys and values, beside exact softmax attention."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, override

import jax
import jax.numpy as jnp

from experiments.benchmarks.base import Cost, Implementation, Inputs, OpBenchmark
from lcattn import ops
from lcattn.nn.layers import unit_norm

EXACT = "softmax, in blocks"
MATERIALIZED = "softmax, materialised"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MechanismsBenchmark(OpBenchmark):
    """Each mechanism at the sizes of its defaults, scaled to the lengths measured.

    What a mechanism computes beside q, k and v (gates, agents, centroids) is given, not learned,
    and costs nothing here. The floor is that of reading q, k, v and writing the output alone.

    Attributes:
      num_heads: N, of queries, keys and values.
      head_dim: H.
      feature_dim: F of Taylor linear attention, which takes the first F channels of q and k.
      num_agents: n of agent attention.
      group_size, window: of core context attention.
      num_clusters: C of routing attention, whose clusters hold 2 * T / C tokens.
      block_size, sample_size, min_seq_len: of HyperAttention.
      power: of re-weighted softplus attention.
      max_materialized: longest sequence for the form that holds all T·T scores.
    """

    num_heads: int = 4
    head_dim: int = 64
    feature_dim: int = 16
    num_agents: int = 16
    group_size: int = 16
    window: int = 256
    num_clusters: int = 16
    block_size: int = 128
    sample_size: int = 128
    min_seq_len: int = 512
    power: float = 15.0
    max_materialized: int = 4096

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive(
            "num_heads", "head_dim", "feature_dim", "num_agents", "group_size", "window",
            "num_clusters", "block_size", "sample_size", "min_seq_len", "power",
            "max_materialized",
        )  # fmt: skip

    @property
    @override
    def op(self) -> str:
        return "mechanisms"

    @property
    @override
    def baselines(self) -> tuple[str, ...]:
        return EXACT, MATERIALIZED

    @override
    def shapes(self, length: int) -> Mapping[str, tuple[int, ...]]:
        shape = (self.batch_size, length, self.num_heads, self.head_dim)
        return {"q": shape, "k": shape, "v": shape}

    @override
    def reference(self, inputs: Inputs) -> Any:
        return ops.softmax_attention(
            inputs["q"], inputs["k"], inputs["v"], implementation="reference"
        )

    @override
    def implementations(self) -> Mapping[str, Implementation]:
        def materialized(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

        table = {
            EXACT: Implementation(functools.partial(ops.softmax_attention, implementation="xla")),
            MATERIALIZED: Implementation(materialized, self.max_materialized),
        }
        for name, run in self._mechanisms().items():
            table[name] = Implementation(run, reference=functools.partial(run, "reference"))
        return table

    @override
    def forward_cost(self, length: int) -> Cost:
        count = self.batch_size * length * self.num_heads * self.head_dim
        return Cost(0.0, self.element_bytes(4 * count))

    def _mechanisms(self) -> dict[str, Callable[..., Any]]:
        """Functions of `implementation=None` and keywords q, k, v."""
        N, H = self.num_heads, self.head_dim

        def constant(*shape: int) -> jax.Array:
            return jax.random.normal(jax.random.key(1), shape)

        def linear(implementation=None, *, q, k, v):
            q, k = q[..., : self.feature_dim], k[..., : self.feature_dim]
            return ops.linear_attention(q, k, v, implementation=implementation)

        def gated_linear(implementation=None, *, q, k, v):
            decay = jnp.full(q.shape, -0.02, jnp.float32)
            return ops.gated_linear_attention(q, k, v, decay, implementation=implementation)

        def gated_delta(implementation=None, *, q, k, v):
            gates = jnp.full(q.shape[:3], 0.5, jnp.float32)
            return ops.gated_delta_rule(
                q, unit_norm(k), v, -0.04 * gates, gates, implementation=implementation
            )

        def agent(implementation=None, *, q, k, v):
            agents = constant(self.num_agents, N, H).astype(q.dtype)
            return ops.agent_attention(q, k, v, agents, implementation=implementation)

        def selective(implementation=None, *, q, k, v):
            ones = jnp.ones(q.shape[:3], jnp.float32)
            return ops.selective_attention(q, k, v, ones, ones, implementation=implementation)

        def softplus(implementation=None, *, q, k, v):
            return ops.softplus_attention(
                q, k, v, power=self.power, implementation=implementation
            )  # fmt: skip

        def core_context(implementation=None, *, q, k, v):
            return ops.core_context_attention(
                q, k, v, group_size=self.group_size, window=self.window,
                implementation=implementation,
            )  # fmt: skip

        def routing(implementation=None, *, q, k, v):
            del k
            return ops.routing_attention(
                q, v, constant(N, self.num_clusters, H).astype(q.dtype),
                cluster_size=-(-2 * q.shape[1] // self.num_clusters),
                implementation=implementation,
            )  # fmt: skip

        def hyper(implementation=None, *, q, k, v):
            return ops.hyper_attention(
                q, k, v, rng=jax.random.key(0), block_size=self.block_size,
                sample_size=self.sample_size, min_seq_len=self.min_seq_len,
                implementation=implementation,
            )  # fmt: skip

        def memory(depth, implementation=None, *, q, k, v):
            rate = jnp.full(q.shape[:3], 0.1 / 64, jnp.float32)
            momentum, decay = jnp.full_like(rate, 0.9), jnp.full_like(rate, 0.01)
            return ops.neural_memory(
                unit_norm(q), unit_norm(k), v, 0.1 * rate, momentum, decay,
                [constant(N, H, H) * H**-0.5] * depth, implementation=implementation,
            )  # fmt: skip

        return {
            "linear (Taylor)": linear,
            "gated linear": gated_linear,
            "gated delta rule": gated_delta,
            "agent": agent,
            "selective": selective,
            "softplus (LSSAR)": softplus,
            "core context": core_context,
            "routing": routing,
            "hyper": hyper,
            "neural memory, 1 layer": functools.partial(memory, 1),
            "neural memory, 2 layers": functools.partial(memory, 2),
        }
