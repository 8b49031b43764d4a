"""Times the linear-attention kernels against the XLA form on one GPU, and checks them first.

    python -m benchmarks.linear_attention_kernel --out benchmarks/h200/linear_attention_kernel.json

Every value and gradient is compared with the XLA form in float64 on fresh random inputs, after
filling the memory that outputs are allocated from with NaN. Times are the sum of the kernels of
one call (CUPTI, median of 9), and the wall time of a call with its host work (median of 30).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks import kernels
from lcattn.ops import linear_attention
from pallas_kernels.linear_attention.config import LaunchConfig
from pallas_kernels.linear_attention.mosaic_gpu import linear_attention as kernel


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; `groups` None is the heuristic's."""

    feature_map: Literal["taylor", "identity"]
    B: int
    T: int
    N: int
    K: int
    F: int
    H: int
    normalize: bool
    groups: int | None = None
    stages: int = 2
    reference_heads: int | None = None

    @property
    def name(self) -> str:
        """As the table spells it."""
        split = "" if self.groups is None else f" groups={self.groups} stages={self.stages}"
        kind = "normalised" if self.normalize else "plain"
        return (
            f"{self.feature_map} {kind} B={self.B} T={self.T} N={self.N} K={self.K} F={self.F}"
            f" H={self.H}{split}"
        )

    def inputs(self, seed: int):
        """q, k, v and the gradient of the output."""
        keys = jax.random.split(jax.random.key(seed), 4)
        shapes = [(self.N, self.F), (self.K, self.F), (self.K, self.H), (self.N, self.H)]
        return tuple(
            jax.random.normal(key, (self.B, self.T, *shape), jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )

    def forms(self):
        """Ours and XLA's."""
        return {"mosaic_gpu": self.ours, "xla": self.reference}

    def ours(self, q, k, v):
        """The kernel."""
        config = (
            None if self.groups is None else LaunchConfig(groups=self.groups, stages=self.stages)
        )
        return kernel(
            q, k, v, feature_map=self.feature_map, scale=self.F**-0.5, normalize=self.normalize,
            config=config,
        )[0]  # fmt: skip

    def reference(self, q, k, v):
        """The op's XLA form."""
        return linear_attention(
            q, k, v, feature_map=self.feature_map, normalize=self.normalize, implementation="xla"
        )

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


TAYLOR: dict[str, Any] = {
    "feature_map": "taylor",
    "N": 16,
    "K": 16,
    "F": 16,
    "H": 64,
    "normalize": True,
}
IDENTITY: dict[str, Any] = {
    "feature_map": "identity",
    "N": 16,
    "K": 16,
    "F": 128,
    "H": 128,
    "normalize": False,
}
CASES = [
    Case(B=1, T=32768, **TAYLOR),
    Case(B=16, T=2048, **TAYLOR),
    Case(B=1, T=32768, **IDENTITY),
    Case(B=1, T=1024, **TAYLOR),
    Case(B=1, T=1000, **(TAYLOR | {"K": 4, "H": 128})),
    Case(B=4, T=8192, **TAYLOR),
    Case(B=1, T=32768, **(TAYLOR | {"normalize": False})),
    Case(B=1, T=131072, **TAYLOR),
]

if __name__ == "__main__":
    kernels.main("linear_attention_kernel", __doc__.splitlines()[0], CASES)
