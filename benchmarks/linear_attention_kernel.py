"""Times the linear-attention kernels against the XLA form on one GPU, and checks them first.

    python -m benchmarks.linear_attention_kernel --out benchmarks/h200/linear_attention_kernel.json

Every value and gradient is compared with the XLA form in float64 on fresh random inputs, after
filling the memory that outputs are allocated from with NaN. Times are the sum of the kernels of
one call (CUPTI, median of 9), and the wall time of a call with its host work (median of 30).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks import kernels
from lcattn.ops import linear_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; so many `documents` of like length packed in each row, unless it is None."""

    feature_map: Literal["taylor", "elu", "identity"]
    B: int
    T: int
    N: int
    K: int
    F: int
    H: int
    normalize: bool
    documents: int | None = None
    reference_heads: int | None = None
    compare_xla: bool = True

    @property
    def name(self) -> str:
        """As the table spells it."""
        kind = "normalised" if self.normalize else "plain"
        packed = "" if self.documents is None else f" documents={self.documents}"
        return (
            f"{self.feature_map} {kind} B={self.B} T={self.T} N={self.N} K={self.K} F={self.F}"
            f" H={self.H}{packed}"
        )

    def inputs(self, seed: int):
        """q, k, v and the gradient of the output."""
        keys = jax.random.split(jax.random.key(seed), 4)
        shapes = [(self.N, self.F), (self.K, self.F), (self.K, self.H), (self.N, self.H)]
        q, k, v, g = (
            jax.random.normal(key, (self.B, self.T, *shape), jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )
        if self.normalize and self.feature_map == "identity":
            q, k = jnp.abs(q), jnp.abs(k)  # or weights may sum to nothing
        return q, k, v, g

    def forms(self) -> dict[str, Callable]:
        """Ours and XLA's."""
        ours = {"mosaic_gpu": self.ours}
        return {**ours, "xla": self.reference} if self.compare_xla else ours

    @property
    def ours(self):
        """The kernels."""
        return self.form("mosaic_gpu")

    @property
    def reference(self):
        """The op's XLA form."""
        return self.form("xla")

    def form(self, implementation: str):
        """The op, by one implementation."""

        def run(q, k, v):
            segment_ids = None
            if self.documents is not None:
                segment_ids = jnp.arange(self.T, dtype=jnp.int32) * self.documents // self.T
                segment_ids = jnp.broadcast_to(segment_ids, (self.B, self.T))
            return linear_attention(
                q, k, v, feature_map=self.feature_map, normalize=self.normalize,
                segment_ids=segment_ids, implementation=implementation,
            )  # fmt: skip

        return run

    def floor(self, *, backward: bool) -> float:
        """Seconds: the larger of matrix work and traffic, each input and output moved once.

        Work counts what the chunked form needs with 64 tokens a chunk and D = 153 or F features.
        """
        D = 153 if self.feature_map == "taylor" else self.F
        F, H, C = self.F, self.H, 64
        flops = 4 * D * H + C * (F + H)  # causal half of the scores
        size = 2 * (self.N * (F + H) + self.K * (F + H))
        if backward:  # two sweeps, each recomputing what it needs, and q, k, v, g, dq, dk, dv
            flops += 4 * D * H + 2 * C * (F + F + H) / 2 + 6 * D * H + 2 * C * (2 * F + 2 * H) / 2
            size += 2 * (3 * self.N * (F + H) + 2 * self.K * (F + H))
        tokens = self.B * self.T
        return max(tokens * self.N * flops / kernels.MATRIX_RATE, tokens * size / kernels.BANDWIDTH)


_HEADS = {"N": 16, "K": 16}
TAYLOR: dict[str, Any] = _HEADS | {"feature_map": "taylor", "F": 16, "H": 64, "normalize": True}
IDENTITY: dict[str, Any] = _HEADS | {
    "feature_map": "identity", "F": 128, "H": 128, "normalize": False,
}  # fmt: skip
NORMALISED: dict[str, Any] = IDENTITY | {"normalize": True}
ELU: dict[str, Any] = NORMALISED | {"feature_map": "elu"}

_LONG: dict[str, Any] = {"B": 1, "T": 32768, "reference_heads": 2}
CASES = [
    Case(**_LONG, **TAYLOR),
    Case(B=16, T=2048, **TAYLOR, compare_xla=False),
    Case(**_LONG, **IDENTITY),
    Case(**_LONG, **TAYLOR, documents=13),
    Case(**_LONG, **ELU, compare_xla=False),
    Case(**_LONG, **NORMALISED),
    Case(**_LONG, **ELU, documents=13),
    Case(B=1, T=1024, **TAYLOR),
    Case(B=1, T=256, **TAYLOR),
    Case(B=1, T=256, **IDENTITY),
]
_SHORT: dict[str, Any] = {"B": 2, "T": 1000, "N": 4, "K": 2}
CHECKS = [
    Case(**(TAYLOR | _SHORT | {"H": 128})),
    Case(**(TAYLOR | _SHORT | {"normalize": False}), documents=7),
    Case(**(ELU | _SHORT | {"F": 64, "H": 64}), documents=7),
    Case(**(IDENTITY | _SHORT), documents=7),
]

if __name__ == "__main__":
    kernels.main("linear_attention_kernel", __doc__.splitlines()[0], CASES, CHECKS)
