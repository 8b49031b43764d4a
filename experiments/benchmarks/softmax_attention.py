"""Exact causal attention, with or without a sliding window."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, override

import jax

from experiments.benchmarks import peers
from experiments.benchmarks.base import Cost, Implementation, Inputs, OpBenchmark, visible_pairs
from lcattn.ops import softmax_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxAttentionBenchmark(OpBenchmark):
    """Causal `softmax_attention`.

    Attributes:
      num_heads: N.
      num_kv_heads: K; None: as many as query heads.
      head_dim: H.
      window: keys seen by a query; None: all before it.
      max_materialized: longest sequence for forms that hold all T·T scores.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int = 64
    window: int | None = None
    max_materialized: int = 4096

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("num_heads", "num_kv_heads", "head_dim", "window", "max_materialized")

    @property
    @override
    def op(self) -> str:
        return "softmax_attention"

    @override
    def shapes(self, length: int) -> Mapping[str, tuple[int, ...]]:
        keys = (self.batch_size, length, self.num_kv_heads or self.num_heads, self.head_dim)
        return {"q": (*keys[:2], self.num_heads, self.head_dim), "k": keys, "v": keys}

    @override
    def reference(self, inputs: Inputs) -> Any:
        return softmax_attention(
            inputs["q"], inputs["k"], inputs["v"], window=self.window, implementation="reference"
        )

    @override
    def implementations(self) -> Mapping[str, Implementation]:
        ours = functools.partial(softmax_attention, window=self.window)
        reach = None if self.window is None else (self.window - 1, 0)

        def materialized(q, k, v):
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=reach, implementation="xla"
            )

        table = {
            "lcattn": Implementation(ours),
            "lcattn reference": Implementation(
                functools.partial(ours, implementation="reference"), self.max_materialized
            ),
            "jax.nn xla": Implementation(materialized, self.max_materialized),
        }
        if jax.default_backend() == "gpu":  # elsewhere, "lcattn" is the XLA form
            for name in ("xla", "cudnn"):
                table[f"lcattn {name}"] = Implementation(
                    functools.partial(ours, implementation=name)
                )
        return table | peers.softmax_attention(window=self.window)

    @override
    def forward_cost(self, length: int) -> Cost:
        B, N, H = self.batch_size, self.num_heads, self.head_dim
        pairs = B * N * visible_pairs(length, self.window)
        heads = N + (self.num_kv_heads or N)
        return Cost(4.0 * pairs * H, self.element_bytes(2 * B * length * heads * H))

    @override
    def cost(self, length: int, *, backward: bool) -> Cost:
        flops, moved = super().cost(length, backward=backward)
        # Backward is five products for the forward pass's two: the scores are computed again.
        return Cost(flops * 3.5 / 3 if backward else flops, moved)
