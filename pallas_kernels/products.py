"""Matrix products inside a Mosaic GPU kernel.

On the chip an operand is a shared-memory ref, or (the left one only) a bfloat16 tile in registers,
and the sum is a float32 tile in registers. The CPU simulator runs neither register operands nor
accumulators that are given a value, so under it the same products are taken by `jnp.dot`; all of a
kernel but these functions is then what runs on the chip.

Results pass a barrier of the compiler. To LLVM arithmetic on registers is pure and may float over
the wait that makes a sum final; kept in place, a kernel with three tiles of state spilled 372 bytes
a thread rather than 580, and ptxas no longer serialised its products for want of registers (C7512).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import zeros

Operand = Any  # a shared-memory ref or a register tile
Pair = tuple[Operand, Operand]


@dataclasses.dataclass(frozen=True)
class Products:
    """Products of bfloat16 tiles, summed in float32.

    Attributes:
      interpret: whether the kernel runs in the CPU simulator.
    """

    interpret: bool = False

    def product(
        self, a: Operand, b: Operand, meanwhile: Callable[[], None] = lambda: None
    ) -> jax.Array:
        """`a b`; `meanwhile` is called while it is in flight."""
        if self.interpret:
            result = _dot(a, b)
            meanwhile()
            return result

        def issue(acc):
            plgpu.wgmma(acc, a, b)
            meanwhile()
            return lax.optimization_barrier(acc[...])

        return pl.run_scoped(issue, _accumulator(a, b))

    def maybe(self, pair: Pair | None) -> Any:
        """The product of a pair, or None."""
        return None if pair is None else self.product(*pair)

    def products(
        self,
        first: Pair,
        second: Pair,
        then: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Two products in flight at once.

        The first is given as what `then` makes of it while the second is in flight.
        """
        if self.interpret:
            x = _dot(*first)
            return x if then is None else then(x), _dot(*second)

        def issue(acc_0, acc_1):
            plgpu.wgmma(acc_0, *first)
            plgpu.wgmma(acc_1, *second)
            if then is None:
                return lax.optimization_barrier((acc_0[...], acc_1[...]))
            x = lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc_0, wait_n=1))
            x = lax.optimization_barrier(then(x))
            return x, lax.optimization_barrier(acc_1[...])

        return pl.run_scoped(issue, _accumulator(*first), _accumulator(*second))

    def accumulate(
        self,
        total: jax.Array,
        a: Operand,
        b: Operand,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> jax.Array:
        """`total + a b`; `meanwhile` is called while it is in flight.

        The sum never leaves its registers. One product only: issuing a second into the same
        registers makes the compiler serialise them, so operands are concatenated instead.
        """
        if self.interpret:
            result = total + _dot(a, b)
            meanwhile()
            return result

        def issue(acc):
            plgpu.wgmma(acc, a, b)
            meanwhile()
            plgpu.wgmma_wait(0)

        return lax.optimization_barrier(pl.run_state(issue)(plgpu.ACC.init(total)))

    def accumulate_beside(
        self, total: jax.Array, a: Operand, b: Operand, other: Pair | None
    ) -> tuple[jax.Array, Any]:
        """`total + a b`, and another product (None if there is none), in flight at once."""
        if other is None:
            return self.accumulate(total, a, b), None
        rows, columns = other[0].shape[0], other[1].shape[1]
        return self.accumulate_both((total, a, b), (zeros(columns, rows), *other))

    def accumulate_both(
        self,
        first: tuple[jax.Array, Operand, Operand],
        second: tuple[jax.Array, Operand, Operand],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[jax.Array, jax.Array]:
        """Two sums `total + a b`, in flight at once; `meanwhile` is called while they are."""
        return self.accumulate_all(first, second, meanwhile=meanwhile)  # pyrefly: ignore

    def accumulate_all(
        self,
        *sums: tuple[jax.Array, Operand, Operand],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[jax.Array, ...]:
        """Sums `total + a b`, in flight at once; `meanwhile` is called while they are."""
        if self.interpret:
            results = tuple(self.accumulate(*each) for each in sums)
            meanwhile()
            return results

        def issue(accs):
            for acc, (_, a, b) in zip(accs, sums, strict=True):
                plgpu.wgmma(acc, a, b)
            meanwhile()
            plgpu.wgmma_wait(0)

        totals = tuple(plgpu.ACC.init(total) for total, *_ in sums)
        return lax.optimization_barrier(pl.run_state(issue)(totals))


def _accumulator(a: Operand, b: Operand):
    return plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32)


def _dot(a: Operand, b: Operand) -> jax.Array:
    result = jnp.dot(_value(a), _value(b), preferred_element_type=jnp.float32)
    # The matrix unit reads shared memory as copies write it; a load is ordered before these so.
    plgpu.commit_smem()
    return result


def _value(operand: Operand) -> jax.Array:
    return operand if isinstance(operand, jax.Array) else operand[...]
