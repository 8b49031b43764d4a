"""What the TPU kernels share: feature-major arrays, products of their tiles, and launching.

A TPU's vectors are 128 lanes wide, and arrays in its memory are padded to that: `[B,T,N,16]` would
take eight times its size. So kernels see arrays FEATURE-MAJOR, `[B,heads,size,T]`: tokens along
lanes, whatever the sizes of heads. What belongs to a token is then a row, what is summed over the
other tokens is summed over rows by plain additions, and of the products only those that contract
features of both sides need a transposed operand.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Tokens that fill a vector: what chunks and blocks of tokens are multiples of."""

SUBLANES = 8
"""What the sizes of heads are multiples of."""

PACKED_SUBLANES = 16
"""Rows of a tile of bfloat16."""

DTYPES = (jnp.bfloat16, jnp.float32)
"""Dtypes of operands. The matrix unit has no float16."""


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """A product summed in float32, over axis `contract[0]` of a and `contract[1]` of b."""
    # The matrix unit multiplies bfloat16; float32 takes it six passes.
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())),
        precision=exact, preferred_element_type=jnp.float32,
    )  # fmt: skip


def feature_major(x: jax.Array, length: int) -> jax.Array:
    """`[B,T,heads,size] -> [B,heads,size,length]`, padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
    return x.transpose(0, 2, 3, 1)


def token_major(x: jax.Array, length: int) -> jax.Array:
    """`[B,heads,size,T] -> [B,length,heads,size]`: undoes `feature_major`."""
    return x.transpose(0, 3, 1, 2)[:, :length]


def column(row: jax.Array) -> jax.Array:
    """`[1,C] -> [C,1]`: a number of each token, to compare with those of other tokens."""
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def token_block(x: Any, tokens: int, step: Callable[..., Any] = lambda i: i) -> pl.BlockSpec:
    """Tokens of one head, of arrays `[B,heads,...,T]` on a grid of rows, heads and steps.

    Args:
      x: the array, or its type.
      tokens: of a step.
      step: which of them each place on the grid takes.
    """
    middle = (0,) * (len(x.shape) - 3)
    return pl.BlockSpec(
        (None, None, *x.shape[2:-1], tokens), lambda b, head, i: (b, head, *middle, step(i))
    )


def head_block(x: Any) -> pl.BlockSpec:
    """All that an array `[B,heads,...]` holds of one head, on the same grid."""
    middle = (0,) * (len(x.shape) - 2)
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, head, i: (b, head, *middle))


def launch(
    body: Callable[..., None],
    *arrays: Any,
    grid: Sequence[int],
    sequential: int,
    in_specs: Sequence[Any],
    out_specs: Sequence[Any],
    out_type: Sequence[Any],
    scratch: Sequence[Any],
    interpret: bool,
    scalars: Sequence[jax.Array] = (),
    vmem_bytes: int | None = None,
) -> Any:
    """Runs a kernel; inputs and outputs that are None reach it as None.

    Args:
      body: the kernel, named as profiles shall show it.
      *arrays: its inputs.
      grid: sizes of the grid's axes.
      sequential: how many of them, the last ones, are walked in order.
      in_specs, out_specs: block specs.
      out_type: shapes and dtypes of outputs.
      scratch: scratch in VMEM.
      interpret: whether to run in the TPU simulator, which walks parallel axes in random order and
        looks for races.
      scalars: integers known before the kernel runs, given to block specs last and to it first.
      vmem_bytes: most VMEM that the kernel may take; default: what compilers grant, 16 MiB or more.
    """
    parallel = len(grid) - sequential
    semantics = ("parallel",) * parallel + ("arbitrary",) * sequential
    return pl.pallas_call(
        body, out_shape=list(out_type), name=body.__name__,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=tuple(grid), in_specs=list(in_specs),
            out_specs=list(out_specs), scratch_shapes=list(scratch),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
    )(*scalars, *arrays)  # fmt: skip
