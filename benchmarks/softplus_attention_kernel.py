"""Times the softplus-attention kernels against cuDNN's softmax and the XLA form on one GPU.

    python -m benchmarks.softplus_attention_kernel \
        --out benchmarks/h200/softplus_attention_kernel.json

Every value and gradient is compared with the XLA form in float64 on fresh random inputs, after
filling the memory that outputs are allocated from with NaN. Times are the sum of the kernels of
one call (CUPTI, median of 9, or 2 of slow calls), and the wall time of a call with its host work.
"""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import kernels
from lcattn.ops import softplus_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; `packed` is the number of documents a row, `power` None is LSSA."""

    B: int
    T: int
    N: int
    K: int
    H: int
    power: float | None = 15.0
    packed: int = 1
    reference_heads: int | None = None
    with_xla: bool = True

    @property
    def name(self) -> str:
        """As the table spells it."""
        kind = "LSSA" if self.power is None else f"LSSAR p={self.power:g}"
        packed = f" documents={self.packed}" if self.packed > 1 else ""
        return f"{kind} B={self.B} T={self.T} N={self.N} K={self.K} H={self.H}{packed}"

    def inputs(self, seed: int):
        """q, k, v and the gradient of the output."""
        keys = jax.random.split(jax.random.key(seed), 4)
        return tuple(
            jax.random.normal(key, (self.B, self.T, heads, self.H), jnp.bfloat16)
            for key, heads in zip(keys, (self.N, self.K, self.K, self.N), strict=True)
        )

    def forms(self):
        """Ours, cuDNN's softmax attention of one document, and XLA's form of ours."""

        def cudnn(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

        forms = {"mosaic_gpu": self.ours, "cudnn_softmax": cudnn}
        return forms | {"xla": self.reference} if self.with_xla else forms

    def ours(self, q, k, v):
        """The kernels."""
        return self._attend(q, k, v, "mosaic_gpu")

    def reference(self, q, k, v):
        """The op's XLA form."""
        return self._attend(q, k, v, "xla")

    def _attend(self, q, k, v, implementation):
        ids = None
        if self.packed > 1:  # documents of unequal lengths, and padding at the end
            edges = jnp.linspace(0, 1, self.packed + 1)[1:-1] ** 1.5 * self.T
            index = jnp.arange(self.T)
            ids = jnp.searchsorted(edges.astype(jnp.int32), index, side="right").astype(jnp.int32)
            ids = jnp.where(index < self.T - self.T // 50, ids, -1)
            ids = jnp.broadcast_to(ids, (self.B, self.T))
        return softplus_attention(
            q, k, v, power=self.power, segment_ids=ids, implementation=implementation
        )

    def floor(self, *, backward: bool) -> float:
        """Seconds: the largest of matrix work, exp2 and log2, and traffic.

        Scores are those of one causal document. A score takes one product in the walk that sums
        rows (LSSAR), two in the one that mixes values, five in the gradient.
        """
        scores = self.B * self.N * self.T * (self.T + 1) / 2
        products, transcendentals = (2, 2) if self.power is None else (3, 3)
        size = self.B * self.T * self.H * 2 * (2 * self.N + 2 * self.K)
        if backward:
            products, transcendentals, size = products + 5, transcendentals + 3, 3 * size
        if self.packed > 1:
            return size / kernels.BANDWIDTH
        return max(
            scores * products * 2 * self.H / kernels.MATRIX_RATE,
            scores * transcendentals / kernels.TRANSCENDENTAL_RATE,
            size / kernels.BANDWIDTH,
        )


WIDE = {"N": 16, "K": 16, "H": 128}
CASES = [
    Case(B=1, T=32768, **WIDE, reference_heads=2),
    Case(B=1, T=1024, **WIDE),
    Case(B=1, T=256, **WIDE),
    Case(B=1, T=1000, N=16, K=4, H=64, power=3.0),
    Case(B=2, T=4096, **WIDE, packed=7),
    Case(B=4, T=8192, **WIDE, reference_heads=2, with_xla=False),
    Case(B=1, T=32768, **WIDE, power=None, reference_heads=2, with_xla=False),
    Case(B=1, T=32768, N=16, K=16, H=64, reference_heads=2, with_xla=False),
    Case(B=1, T=131072, **WIDE, reference_heads=1, with_xla=False),
]

if __name__ == "__main__":
    kernels.main("softplus_attention_kernel", __doc__.splitlines()[0], CASES)
