"""Times the gated linear-attention kernels against the XLA form on one GPU, and checks them first.

    python -m benchmarks.gated_linear_attention_kernel --out RECORD.json

The record is benchmarks/h200/gated_linear_attention_kernel.json. Every value and gradient, that of
the log decays too, is compared with the XLA form in float64 on fresh random inputs, after filling
the memory that outputs are allocated from with NaN. Times are the sum of the kernels of one call
(CUPTI, median of 9), and the wall time of a call with its host work (median of 30).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import kernels
from lcattn.ops import gated_linear_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; log decays are `log sigmoid(normal) · strength`, -inf at every `reset`th token.

    Decays are those of channels, or `by_head`.
    """

    B: int
    T: int
    N: int = 16
    M: int = 16
    F: int = 128
    H: int = 128
    strength: float = 1 / 16
    reset: int | None = None
    decay_dtype: str = "bfloat16"
    by_head: bool = False
    compare_xla: bool = True
    reference_heads: int | None = None

    @property
    def name(self) -> str:
        """As the table spells it."""
        reset = "" if self.reset is None else f" reset={self.reset}"
        return (
            f"B={self.B} T={self.T} N={self.N} M={self.M} F={self.F} H={self.H}"
            f" decay={self.strength}{reset}{' by head' * self.by_head} {self.decay_dtype}"
        )

    def inputs(self, seed: int):
        """q, k, v, the log decays and the gradient of the output."""
        keys = jax.random.split(jax.random.key(seed), 5)
        shapes = [(self.N, self.F), (self.M, self.F), (self.M, self.H), (self.N, self.H)]
        q, k, v, g = (
            jax.random.normal(key, (self.B, self.T, *shape), jnp.bfloat16)
            for key, shape in zip(keys[:4], shapes, strict=True)
        )
        shape = (*k.shape[:3], 1 if self.by_head else self.F)
        decay = jax.nn.log_sigmoid(jax.random.normal(keys[4], shape)) * self.strength
        if self.reset is not None:
            decay = decay.at[:, self.reset :: self.reset].set(-jnp.inf)
        return q, k, v, decay.astype(self.decay_dtype), g

    def forms(self):
        """Ours and XLA's."""
        ours = {"mosaic_gpu": self.ours}
        return {**ours, "xla": self.reference} if self.compare_xla else ours

    def ours(self, q, k, v, decay):
        """The kernels."""
        return self._attend(q, k, v, decay, "mosaic_gpu")

    def reference(self, q, k, v, decay):
        """The op's XLA form."""
        return self._attend(q, k, v, decay, "xla")

    def _attend(self, q, k, v, decay, implementation):
        decay = decay[..., 0] if self.by_head else decay
        return gated_linear_attention(q, k, v, decay, implementation=implementation)

    def floor(self, *, backward: bool) -> float:
        """Seconds: the larger of matrix work and traffic, each input and output moved once.

        Work counts what the chunked form needs with 64 tokens a chunk where decays are mild,
        without the sums of log decays.
        """
        F, H, C = self.F, self.H, 64
        flops = 4 * F * H + C * (F + H)
        decays = 1 if self.by_head else F
        per_state = 2 * (F + H) + jnp.dtype(self.decay_dtype).itemsize * decays
        size = self.N * 2 * (F + H) + self.M * per_state
        if backward:
            flops += 10 * F * H + C * (3 * F + 2 * H)
            size += self.N * 2 * (2 * F + 2 * H) + 2 * self.M * per_state
        tokens = self.B * self.T
        return max(tokens * self.N * flops / kernels.MATRIX_RATE, tokens * size / kernels.BANDWIDTH)


_LONG: dict[str, Any] = {"B": 1, "T": 32768, "reference_heads": 1}
CASES = [
    Case(**_LONG),
    Case(B=16, T=2048, reference_heads=1, compare_xla=False),
    Case(**_LONG, decay_dtype="float32", compare_xla=False),
    Case(**_LONG, by_head=True),
    Case(**_LONG, strength=8.0, compare_xla=False),
    Case(B=1, T=1024),
    Case(B=1, T=256),
    # Sizes that are padded or cut: GLA as published, and small keys.
    Case(B=1, T=8192, N=4, M=4, H=256),
    Case(B=1, T=8192, N=8, M=8, F=32, H=64),
]
_SHORT: dict[str, Any] = {"B": 1, "T": 1000, "N": 4, "M": 2}
CHECKS = [
    Case(**_SHORT, F=64, H=64, strength=3.0, reset=100, decay_dtype="float32"),
    Case(**_SHORT, F=64, strength=3.0, reset=100),
    Case(**_SHORT, strength=3.0, reset=100, decay_dtype="float32"),
    Case(**_SHORT, F=64, H=64),
    Case(**_SHORT, reset=100, by_head=True, decay_dtype="float32"),
]

if __name__ == "__main__":
    kernels.main("gated_linear_attention_kernel", __doc__.splitlines()[0], CASES, CHECKS)
