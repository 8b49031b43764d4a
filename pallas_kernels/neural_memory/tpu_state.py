"""A state in VMEM: of each layer a ref `[3,in,out]`, or `[2,in,out]` where no anchor is kept."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.neural_memory.tpu_chunk import Layers, Memory
from pallas_kernels.neural_memory.tpu_plan import Kind

WEIGHTS, MOMENTUM, ANCHOR = range(3)
"""Parts of a state."""


def begin(
    kind, memory: list[Any], anchor: list[Any], fresh: Any, here: tuple[Any, Any], done: Any
) -> None:
    """Replaces the network where a document begins, and the anchor where a chunk does.

    Args:
      kind: of the chunk.
      memory: network and momentum.
      anchor: of each layer `[in,out]`.
      fresh: networks of new documents, in HBM, or None.
      here: whose is this one's.
      done: a semaphore.
    """
    if fresh is not None:

        @pl.when(kind == Kind.RENEWS)
        def _():
            copy([ref.at[here] for ref in fresh], [ref.at[WEIGHTS] for ref in memory], done)
            for ref in memory:
                ref[MOMENTUM] = jnp.zeros_like(ref[MOMENTUM])

    @pl.when(kind >= Kind.STARTS)
    def _():
        for ref, weights in zip(anchor, memory, strict=True):
            ref[...] = weights[WEIGHTS]


def load(state: list[Any]) -> Memory:
    """Network and momentum."""
    return Memory(*(tuple(ref[part] for ref in state) for part in (WEIGHTS, MOMENTUM)))


def store(state: list[Any], memory: Memory) -> None:
    """Puts network and momentum in their places."""
    for ref, weights, momentum in zip(state, *memory, strict=True):
        ref[WEIGHTS] = weights
        ref[MOMENTUM] = momentum


def copy(sources: list[Any], targets: list[Any], done: Any) -> None:
    """Copies between HBM and VMEM, and waits for the semaphore `done`."""
    transfers = [
        pltpu.make_async_copy(source, target, done)
        for source, target in zip(sources, targets, strict=True)
    ]
    for transfer in transfers:
        transfer.start()
    for transfer in transfers:
        transfer.wait()


def scratch(layers: Layers, *copies: int) -> tuple[Any, ...]:
    """Scratch for so many networks."""
    return tuple(pltpu.VMEM((*copies, *x.shape[-2:]), jnp.float32) for x in layers)
