"""The public op: arguments, checks and the choice of an implementation."""

from collections.abc import Callable

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.block_sparse_attention import blockwise, columns, dense, gpu_kernel, tpu_kernel
from lcattn.ops.block_sparse_attention.plan import BlockPlan
from lcattn.ops.block_sparse_attention.validation import check_plan
from lcattn.ops.merging import merge
from lcattn.typing import Array, Float


@sharding.partitioned
def block_sparse_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    plan: BlockPlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    r"""Softmax attention over the pairs that a plan names, in blocks.

    Layout `[B,T,N,H]`; scores, sums and log-sum-exps in float32, output in the dtype of `q`.

    .. math::
        o_i = \sum_{j \in V(i)} e^{x_{ij} - \ell_i} v_j, \qquad
        \ell_i = \log \sum_{j \in V(i)} e^{x_{ij}}, \qquad
        x_{ij} = \mathrm{scale} \cdot q_i^\top k_j + w_{ij}

    V(i) holds each key once that the plan's rule lets i see and that lies in a block listed for i's
    block of queries, or is one of its columns; w is the log-weight of that entry. A query that sees
    nothing gives zeros, a log-sum-exp of -inf, and zero gradients.

    Most mechanisms that leave out part of the T·S scores say so block by block: windows with sinks,
    packed documents, strides, blocks chosen by a gate or by the input (MInference, arXiv
    2407.02490; SeerAttention, 2410.13276; S2-Attention, 2407.17678; MoA, 2406.14909). They differ
    in their plans only, see `BlockPlan` and its builders::

        plan = sliding_window_plan(T, window=4096, sinks=4)
        plan = document_plan(segment_ids)
        plan = top_blocks_plan(pooled_scores, num_blocks=64, num_keys=T)
        out = block_sparse_attention(q, k, v, plan)

    Here the plan says all of who sees whom. So, unlike other ops, this one takes neither `causal`
    nor `segment_ids`: builders do. Attention over disjoint plans can be put together by the outputs
    and log-sum-exps, gradients included.

    Time O(listed blocks), `plan.density()` of that of dense attention; memory O(T) besides the
    plan, in both passes. What differs from published kernels, and why:

    - whether all pairs of an entry count is found out from the rule, not stated beside it, so that
      the two cannot disagree;
    - a query without keys gives zeros (DKernel: NaN), and a block that is listed twice is an error,
      since it would count twice;
    - any length, and grouped queries without copies of their keys: heads that share a list are rows
      of one block.

    Args:
      q: queries `[B,T,N,F]`.
      k: keys `[B,S,K,F]`; K divides N, and head n reads key head `n // (N // K)`.
      v: values `[B,S,K,H]`; H is mostly F.
      plan: which keys each query reads. Not differentiated.
      scale: factor of the scores; default `F ** -0.5`.
      return_lse: also return the log-sum-exp of each query, `[B,T,N]` float32. Gradients flow
        through it.
      implementation: "mosaic_gpu" (Hopper GPUs; bfloat16 or float16, heads of 64 or 128, blocks of
        multiples of 64), "mosaic_tpu" (TPUs; bfloat16 or float32, blocks of 128, 256 or 512), "xla"
        (block by block, anywhere), "reference" (the definition, T·S memory), or None for the first
        of them that serves the call. Over several devices the kernels belong inside
        `jax.shard_map(..., check_vma=False)`, and run only when named.

    Returns:
      `[B,T,N,H]`, or that and the log-sum-exp.

    Raises:
      ValueError: for arguments that do not fit. The contents of a plan are looked at only outside
        `jit`, or where they are constants.
    """
    sizes = checks.check_heads(q, k, v)
    scale = checks.resolve_scale(scale, sizes.F)
    check_plan(plan, sizes)
    run = dispatch.choose(
        "block_sparse_attention", implementation, sizes=sizes, dtype=q.dtype, plan=plan
    )
    out, lse = run(q, k, v, plan.cleared(), scale=scale)
    return (out, lse) if return_lse else out


def block_sparse_part(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    plan: BlockPlan,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    r"""The output and log-sum-exp of a part of a softmax, for a merge that knows the whole one's.

    The gradient of the log-sum-exp has to come less :math:`o_i \cdot \partial o_i`. Of parts that
    are merged to an output o with log-sum-exp L it then is
    :math:`e^{\ell_i - L_i} (\partial L_i - o_i \cdot \partial o_i)`: what the parts gave is neither
    kept for the backward pass nor read there.

    Args:
      q, k, v, plan: as of `block_sparse_attention`; a plan without columns.
      scale: factor of the scores.
    """
    sizes = checks.check_heads(q, k, v)
    check_plan(plan, sizes)
    if plan.columns is not None:
        raise argument_error("plan.columns", "None in a part of a softmax", "columns")
    run = dispatch.choose("block_sparse_attention", None, sizes=sizes, dtype=q.dtype, plan=plan)
    return run(q, k, v, plan.cleared(), scale=scale, is_part=True)


def _with_columns(attend: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """Lists by `attend` and columns apart, merged to one softmax."""

    def run(
        q: Array, k: Array, v: Array, plan: BlockPlan, *, scale: float, is_part: bool = False
    ) -> tuple[Array, Array]:
        out, lse = attend(q, k, v, plan, scale=scale, is_part=is_part)
        if plan.columns is not None:
            single = columns.attend(q, k, v, plan, scale=scale)
            out, lse = merge((out, lse), single)
        return out.astype(q.dtype), lse

    return run


dispatch.declare(
    "block_sparse_attention",
    {
        "mosaic_gpu": dispatch.Implementation(
            _with_columns(gpu_kernel.attend),
            gpu_kernel.objection,
            gpu_kernel.pays,
            dispatch.no_hopper,
        ),
        "mosaic_tpu": dispatch.Implementation(
            _with_columns(tpu_kernel.attend), tpu_kernel.objection, tpu_kernel.pays, dispatch.no_tpu
        ),
        "xla": dispatch.Implementation(_with_columns(blockwise.attend)),
        "reference": dispatch.Implementation(dense.reference),
    },
)
