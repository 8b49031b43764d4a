r"""Titans' neural memory of one or two layers for Hopper GPUs, in Pallas Mosaic GPU.

Only the memory itself has to go from chunk to chunk. So that alone is a walk, of one cluster a
memory, which leaves network, momentum and writes of every chunk in global memory (`gpu_walk`); all
else is done for every chunk by itself: gates are multiplied (`gpu_gates`) and queries answered
(`gpu_read`). The gradient goes the same way back: chunks by themselves (`gpu_read_pull`), a walk in
reverse that carries the gradient of the memory (`gpu_pull`), and chunks by themselves for what
follows from it for keys, values and gates (`gpu_tokens`, `gpu_gates`). Of one layer (`gpu_linear`),
and of keys and values of 128, chunks by themselves are read, and pulled back, by batched products
of XLA (`gpu_einsums`).

Rows may hold documents, laid out in windows of 64 slots. Where one begins, a walk fetches the fresh
network in place of its state; rows with fewer windows walk fewer (`gpu_plan.Course`).

On an H200, 4 x 8192 tokens of 4 heads with 256 hidden units, projections of tokens of width 384
included, take 0.83 ms forward, of it 0.58 for the walk and 0.15 to read, and 2.78 ms forward and
backward: walks 0.71 and 0.74, to read 0.15 and 0.45, tokens 0.21, gates 0.07, and 0.44 ms in XLA.
XLA's form takes 6.6 and 24.3 ms. About 0.08 ms of each walk are fences (`gpu_plan.Exchange`).

What the walk leaves is kept for the gradient, 4 H F + 4 C F + C H bfloat16 numbers a chunk and
memory. Operands of products are bfloat16, and so are what is kept and its gradients; network,
momentum, their gradients and all sums but those of `gpu_pull` over a cluster are float32.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory import gpu_one_layer, gpu_two_layers
from pallas_kernels.neural_memory.gpu_gates import Gates, views_and_shares
from pallas_kernels.neural_memory.gpu_plan import Course, Plan
from pallas_kernels.tiles import TILE

Layers = tuple[jax.Array, ...]
"""An array a layer."""

SIZES = TILE, 2 * TILE
"""Of keys and values. A CTA holds one tile of each layer: 64 of these numbers, 64 hidden units."""

EXPANSION = 4
"""Hidden units of a memory of two layers, in sizes of its keys: clusters of up to 4 or 16 CTAs."""


def neural_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: Gates,
    weights: Layers,
    momentum: Layers,
    course: Course | None = None,
    *,
    activation: str,
    interpret: bool = False,
) -> tuple[jax.Array, Layers, Layers, Layers]:
    """Answers of a memory that is trained on the way; differentiable in every array.

    Args:
      q: queries `[B,T,M,G,H]`, bfloat16; T is a multiple of 64.
      k: keys `[B,T,M,H]`.
      v: values `[B,T,M,H]`.
      gates: of its tokens, by chunks of 64.
      weights: the network before the first chunk in float32, `[B,M,H,F]` and `[B,M,F,H]`, or
        `[B,M,H,H]` alone.
      momentum: its momentum there.
      course: which rows walk only some of the chunks, and which chunks begin a document. None: all
        walk all, of one document.
      activation: by name, "gelu" in its tanh form.
      interpret: whether to run in the CPU simulator.

    Returns:
      `[B,T,M,G,H]` in the dtype of q, the network and its momentum after the last chunk, and the
      network before every chunk in bfloat16, of each layer `[B,M,n,in,out]`.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    sizes = (q.shape[-1], *(x.shape[-1] for x in weights))
    reason = objection(dtype=q.dtype, length=q.shape[1], chunk=TILE, sizes=sizes)
    if reason is None and q.shape[1] % TILE:
        reason = f"take whole chunks of {TILE} tokens, not {q.shape[1]}"
    if reason is not None:
        raise ValueError(f"neural_memory: the mosaic_gpu kernels {reason}")
    plan = Plan(activation, interpret)
    views, shares = views_and_shares(plan, gates)
    if course is not None:
        shares = jnp.where(course.renews[:, None, :, None, None] > 0, 0, shares)
    heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
    layers = gpu_one_layer if len(weights) == 1 else gpu_two_layers
    starts = tuple(itertools.chain(*zip(weights, momentum, strict=True)))
    out, ends, befores = layers.answer(plan, heads, k, v, shares, views, starts, course)
    return out.reshape(q.shape), ends[::2], ends[1::2], befores


def objection(*, dtype, length: int, chunk: int, sizes: Sequence[int]) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if dtype != jnp.bfloat16:
        return f"take bfloat16, not {jnp.dtype(dtype).name}"
    if chunk != TILE or length < TILE:
        return f"take chunks of {TILE} tokens and a whole one at least, not {chunk} of {length}"
    H, *hidden, last = sizes
    units = range(TILE, EXPANSION * H + 1, TILE)
    if H not in SIZES or last != H or len(hidden) > 1 or not all(F in units for F in hidden):
        return (
            f"take layers of sizes H -> H or H -> F -> H, H = {SIZES[0]} or {SIZES[1]}, F a"
            f" multiple of {TILE} up to {EXPANSION} H, not {' -> '.join(map(str, sizes))}"
        )
    return None
