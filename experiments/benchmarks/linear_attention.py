"""Causal linear attention; by default with the Taylor features of BASED."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, override

import jax
import jax.numpy as jnp

from experiments.benchmarks import peers
from experiments.benchmarks.base import Cost, Implementation, Inputs, OpBenchmark, visible_pairs
from lcattn.ops import linear_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionBenchmark(OpBenchmark):
    """Causal `linear_attention`.

    Attributes:
      num_heads: N; as many key heads.
      head_dim: H, of the values.
      feature_dim: F, of queries and keys before the feature map.
      feature_map: which features.
      max_quadratic: longest sequence for the quadratic form.
      max_recurrent: longest sequence for the token-by-token reference.
    """

    num_heads: int = 4
    head_dim: int = 64
    feature_dim: int = 16
    feature_map: Literal["taylor", "elu", "identity"] = "taylor"
    max_quadratic: int = 4096
    max_recurrent: int = 1024

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive(
            "num_heads", "head_dim", "feature_dim", "max_quadratic", "max_recurrent"
        )

    @property
    @override
    def op(self) -> str:
        return "linear_attention"

    @property
    def num_features(self) -> int:
        """D of the most compact feature map with the same inner products."""
        F = self.feature_dim
        return 1 + F + F * (F + 1) // 2 if self.feature_map == "taylor" else F

    @override
    def shapes(self, length: int) -> Mapping[str, tuple[int, ...]]:
        lead = (self.batch_size, length, self.num_heads)
        return {
            "q": (*lead, self.feature_dim),
            "k": (*lead, self.feature_dim),
            "v": (*lead, self.head_dim),
        }

    @override
    def reference(self, inputs: Inputs) -> Any:
        """The defining sum over all pairs, written apart from the library's own forms."""
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        if self.feature_map == "elu":
            q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        weights = jnp.einsum("btnf,bsnf->bnts", q, k) * self.feature_dim**-0.5
        if self.feature_map == "taylor":
            weights = 1 + weights + weights**2 / 2
        weights = jnp.tril(weights)
        if self.feature_map != "identity":
            weights /= weights.sum(axis=-1, keepdims=True)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    @override
    def implementations(self) -> Mapping[str, Implementation]:
        ours = functools.partial(linear_attention, feature_map=self.feature_map)

        def quadratic(q, k, v):
            return ours(q, k, v, chunk_size=q.shape[1], implementation="xla")

        chunks = Implementation(functools.partial(ours, implementation="xla"))
        return {
            "lcattn": Implementation(ours),
            # Elsewhere that is "lcattn".
            **({"lcattn xla": chunks} if jax.default_backend() == "gpu" else {}),
            "lcattn quadratic": Implementation(quadratic, self.max_quadratic),
            "lcattn reference": Implementation(
                functools.partial(ours, implementation="reference"), self.max_recurrent
            ),
            **peers.linear_attention(feature_map=self.feature_map),
        }

    @override
    def forward_cost(self, length: int) -> Cost:
        B, N, H, F = self.batch_size, self.num_heads, self.head_dim, self.feature_dim
        quadratic = 2.0 * visible_pairs(length) * (F + H)
        chunk = 64
        chunked = length * (4.0 * self.num_features * H + chunk * (F + H))
        moved = self.element_bytes(2 * B * N * length * (F + H))
        return Cost(B * N * min(quadratic, chunked), moved)
