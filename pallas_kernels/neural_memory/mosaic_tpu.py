r"""Titans' neural memory for TPUs, in Pallas Mosaic TPU.

A memory is a chain of matrices with an activation between them, trained on each chunk of keys and
values by one step of gradient descent a token, with momentum and decay of each token, all gradients
at the network before the chunk (`tpu_chunk`). Network and momentum stay in VMEM while a core walks
the chunks of a sequence; the gradient walks them in reverse, from states kept every few chunks
(`tpu_sweeps`). Operands of products have the dtype of q, bfloat16 or float32; all else is float32.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.config import (
    VMEM,
    TpuLaunchConfig,
    tpu_heuristic,
    vmem_bytes,
)
from pallas_kernels.neural_memory.tpu_chunk import Arithmetic, Layers
from pallas_kernels.neural_memory.tpu_plan import Kind, Layout, Plan, Tokens
from pallas_kernels.neural_memory.tpu_sweeps import gradients, outputs
from pallas_kernels.tpu import DTYPES, PACKED_SUBLANES


def neural_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: Sequence[jax.Array],
    kinds: jax.Array,
    used: jax.Array,
    first: jax.Array,
    state: Layers,
    fresh: Layers | None,
    *,
    activate: Callable[[jax.Array], jax.Array],
    config: TpuLaunchConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Layers]:
    """Answers of a memory that is trained on the way; differentiable in all that is real.

    Args:
      q: queries `[B,n,C,M,G,F]` of n chunks of C slots, bfloat16 or float32.
      k: keys `[B,n,C,M,F]`.
      v: values `[B,n,C,M,H]`.
      gates: learning rate, momentum and decay `[B,n,C,M]`.
      kinds: `Kind` of each chunk `[B,n]`. Of a row's chunks with tokens, the first alone may
        continue one.
      used: whether a slot holds a token `[B,n,C]`. Answers of others are of no use.
      first: whether a slot is the first of its chunk or of a document `[B,n,C]`.
      state: before the first chunk, of each layer `[B,M,3,in,out]`: network, momentum, and anchor,
        the network where the chunk under way began.
      fresh: the network of new documents, of each layer `[B,M,in,out]`. None where no chunk RENEWS.
      activate: between layers; element-wise, 0 at 0, of operations that the chip has, and
        twice differentiable.
      config: launch parameters; default: by shape.
      interpret: whether to run in the TPU simulator.

    Returns:
      `[B,n,C,M,G,H]` in the dtype of q, and the state after the last chunk.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    B, n, C, M, G, F = q.shape
    sizes = (F, *(x.shape[-1] for x in state))
    reason = objection(dtype=q.dtype, groups=G, sizes=sizes, chunk=C)
    if reason is not None:
        raise ValueError(f"neural_memory: the mosaic_tpu kernels {reason}")
    slots = _slots(C)
    config = config or tpu_heuristic(
        number=n, groups=G, chunk=slots, sizes=sizes, itemsize=q.dtype.itemsize
    )
    chunks = n + -n % config.chunks
    plan = Plan(
        Arithmetic(activate, q.dtype), groups=G, chunk=slots,
        chunks=config.chunks, interpret=interpret,
    )  # fmt: skip

    def fill(x):
        """Empty slots, and skipped chunks."""
        return jnp.pad(x, ((0, 0), (0, chunks - n), (0, slots - C)) + ((0, 0),) * (x.ndim - 3))

    def by_head(x):
        """`[B,n,C,heads,size] -> [B,heads,nC,size]`."""
        x = fill(x).transpose(0, 3, 1, 2, 4)
        return x.reshape(B, x.shape[1], chunks * slots, x.shape[4])

    tokens = Tokens(
        *(by_head(x) for x in (q.reshape(B, n, C, M * G, F), k, v)),
        gates=jnp.stack([fill(x.astype(jnp.float32)) for x in gates], 2).transpose(0, 4, 1, 2, 3),
    )
    layout = Layout(
        kinds=jnp.pad(kinds, ((0, 0), (0, chunks - n)), constant_values=Kind.SKIPPED),
        marks=jnp.stack([fill(x.astype(jnp.int32)) for x in (used, first)], 2),
    )
    out, state = _remember(plan, tokens, layout, state, fresh)
    out = out.reshape(B, M, G, chunks, slots, -1)[:, :, :, :n, :C]
    return out.transpose(0, 3, 4, 1, 2, 5), state


def objection(*, dtype, groups: int, sizes: Sequence[int], chunk: int) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if dtype not in DTYPES:
        return f"take bfloat16 or float32, not {jnp.dtype(dtype).name}"
    taken = vmem_bytes(1, groups, _slots(chunk), sizes, jnp.dtype(dtype).itemsize)
    if taken > VMEM:
        return (
            f"take up to {VMEM >> 20} MiB of VMEM, not {taken / 2**20:.0f}, as layers of sizes"
            f" {' -> '.join(map(str, sizes))} and chunks of {chunk} need with {groups} queries a"
            " token"
        )
    return None


def _slots(chunk: int) -> int:
    """Slots of a chunk of so many tokens: whole tiles."""
    return chunk + -chunk % PACKED_SUBLANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _remember(plan: Plan, tokens: Tokens, layout: Layout, start: Layers, fresh: Layers | None):
    """Answers `[B,MG,L,H]`, and the final state."""
    return _remember_forward(plan, tokens, layout, start, fresh)[0]


def _remember_forward(plan, tokens, layout, start, fresh):
    out, starts, final = outputs(plan, tokens, layout, start, fresh)
    return (out, final), (tokens, layout, start, fresh, starts)


def _remember_backward(plan, residuals, cotangents):
    tokens, layout, start, fresh, starts = residuals
    d_out, d_final = cotangents
    d_tokens, d_start, d_fresh = gradients(
        plan, tokens, layout, start, fresh, starts, d_out, d_final
    )
    return d_tokens, None, d_start, d_fresh


_remember.defvjp(_remember_forward, _remember_backward)
