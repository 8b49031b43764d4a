"""The public op: arguments, checks and the choice of an implementation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, recurrence, sharding
from lcattn.ops.neural_memory import chunked, gpu_kernel, reference, tpu_kernel
from lcattn.ops.neural_memory.network import Activation, resolve_activation
from lcattn.ops.neural_memory.state import NeuralMemoryState, check_state, neural_memory_state
from lcattn.typing import Array, Float, SegmentIds

DEFAULT_CHUNK = 64
"""C where none is given."""

DEEPEST = 4
"""Layers of the deepest memory; the paper tries 1 to 4."""

dispatch.declare(
    "neural_memory",
    {
        "mosaic_gpu": dispatch.Implementation(
            gpu_kernel.attend, gpu_kernel.objection, gpu_kernel.pays, dispatch.no_hopper
        ),
        "mosaic_tpu": dispatch.Implementation(
            tpu_kernel.attend, tpu_kernel.objection, dispatch.only_when_named, dispatch.no_tpu
        ),
        "xla": dispatch.Implementation(chunked.attend),
        "reference": dispatch.Implementation(reference.attend),
    },
)


@sharding.partitioned
def neural_memory(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    learning_rate: Float[Array, "B T M"],
    momentum: Float[Array, "B T M"],
    decay: Float[Array, "B T M"],
    weights: Sequence[Float[Array, "M _ _"]],
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    activation: Activation = "gelu",
    initial_state: NeuralMemoryState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], NeuralMemoryState]:
    r"""A memory that is a network: trained on each key and value it meets, then asked the query.

    Layout `[B,T,N,H]`; network, momentum and gates in float32, output in the dtype of `q`.

    .. math::
        \ell(M; k, v) &= |M(k) - v|^2 \\
        S_t &= \eta_t S_{t-1} - \theta_t \nabla \ell(M_{t'}; k_t, v_t) \\
        M_t &= (1 - \alpha_t) M_{t-1} + S_t, \qquad o_t = \mathrm{scale} \cdot M_t(q_t)

    That is gradient descent with momentum eta and weight decay alpha, at learning rate theta, on an
    online stream: what surprises the network (a large gradient) is written, and momentum writes
    what follows a surprise too. M_0 is `weights`, S_0 = 0. The network is a chain of matrices, one
    to four, with `activation` between them.

    **The chunk is part of the model.** Gradients are taken at M_{t'}, the network at the start of
    t's chunk of C tokens (counted from the start of the document, however it is cut into calls), so
    that a chunk is computed in matrix products. C = 1 is the exact recurrence; a larger C is
    faster, and a staler gradient.

    **Stability.** Gradients of a chunk add up, so that C writes of one key are one step of size
    2·theta·C, or 2·theta·C / (1 - eta) with momentum. A linear memory with keys of norm 1 diverges
    where that exceeds 2, a deeper one earlier: keep theta below (1 - eta) / (2·C), as
    `nn.NeuralMemory` does.

    Titans: Behrouz, Zhong and Mirrokni 2025, arXiv 2501.00663, equations 8 to 14; the chunk-wise
    form is that of TTT (Sun et al. 2024, arXiv 2407.04620), with momentum and decay of each token
    inside the chunk. Let X_l be the inputs of layer l for the keys of a chunk, E_l the gradients of
    the loss with respect to its outputs. Then the queries pass layer l, at weights of their own
    each, as

        Z = b * (Y W_l) + f * (Y S_l) - ((Y X_l^T) * G) E_l

    with coefficients b, f, G of the gates alone (`coefficients`). No gradient and no weight matrix
    is ever formed for one token. What differs from published code: the gradient point moves on
    with every chunk, gates belong to tokens, not to chunks, a token reads what it wrote, masked
    tokens leave no trace, momentum is part of the state, and a decay of 1 is exact.

    With one layer, eta = alpha = 0 and C = 1 it is the delta rule with beta = 2·theta; with C >= T
    it is linear attention, from `weights` = 0.

    Time O(T·(P + C·(F+H))) for P parameters of the network; memory O(T·(C + P/C)): for the backward
    pass, the network before each chunk is kept. Packed or continued rows are laid out in windows,
    up to three times as many as chunks where documents are short.

    Args:
      q: queries `[B,T,N,F]`; norm 1 is usual, as for keys.
      k: keys `[B,T,K,F]`; K divides N.
      v: values `[B,T,K,H]`.
      learning_rate: theta >= 0, `[B,T,M]`. M is N, or K where the N/K query heads of a group read
        one memory.
      momentum: eta in [0, 1], `[B,T,M]`; 0 forgets the surprise before.
      decay: alpha in [0, 1], `[B,T,M]`; 1 clears the network before it is written.
      weights: the network each document starts with, one `[M,in,out]` a layer: F first, H last.
        All zeros is a fine start for one layer, but a saddle for more: nothing is ever written.
      causal: only True; a memory that is trained on the way has a direction.
      segment_ids: document of each token `[B,T]`, for packed rows.
      scale: factor of the output. Default: 1.
      chunk_size: tokens a chunk C; default 64. Unlike elsewhere, it changes the result.
      activation: "gelu" (tanh form), "relu", "silu", "tanh", or an element-wise function.
      initial_state: what the first document of each row continues, from `return_state` or
        `neural_memory_state`; of the same `chunk_size`.
      return_state: also return the state after the last token (of the last document).
      implementation: "mosaic_gpu" or "mosaic_tpu" (chunks, state on the chip; see
        `pallas_kernels`), "xla" (chunks), "reference" (token by token), or None: on one Hopper GPU
        "mosaic_gpu" from 300 tokens on, where it serves the call, else "xla". It serves one or two
        layers, F = H of 64 or 128, up to 4 H hidden units, bfloat16 and C = 64. Only "xla" and
        "reference" have forward-mode and second derivatives: kernels have a backward pass of their
        own, and calls that need more have to name a form.

    Returns:
      `[B,T,N,H]`, or that and the final state.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = recurrence.check_arrays(q, k, v, segment_ids, causal=causal)
    scale = 1.0 if scale is None else checks.resolve_scale(scale, sizes.F)
    if chunk_size is None:
        chunk_size = DEFAULT_CHUNK
    checks.check_size("chunk_size", chunk_size)
    gates = {"learning_rate": learning_rate, "momentum": momentum, "decay": decay}
    for name, gate in gates.items():
        _check_gate(name, gate, sizes, like=learning_rate)
    states = learning_rate.shape[2]
    _check_weights(weights, sizes, states)
    activate = resolve_activation(activation)
    run = dispatch.choose(
        "neural_memory", implementation, sizes=sizes, dtype=q.dtype, weights=weights,
        chunk=int(chunk_size), activation=activation,
    )  # fmt: skip

    heads, keys, values = recurrence.group_by_state(q, k, v, states)
    dtype = checks.accumulation_dtype(q.dtype)
    tokens = chunked.Tokens(heads, keys, values, *(gate.astype(dtype) for gate in gates.values()))
    fresh = _start(weights, tokens)
    if initial_state is not None:
        check_state(initial_state, fresh)
        initial_state = jax.tree.map(lambda x, other: x.astype(other.dtype), initial_state, fresh)
    out, state = run(
        tokens, initial_state, fresh,
        segment_ids=segment_ids, chunk=int(chunk_size), activate=activate,
    )  # fmt: skip
    out = recurrence.finish(scale * out, segment_ids, q.dtype)
    return (out, state) if return_state else out


def _start(weights: Sequence[Array], tokens: chunked.Tokens) -> NeuralMemoryState:
    """The state of a new document."""
    state = neural_memory_state(weights, tokens.q.shape[0])
    # Sums with zero, so that the state varies over a mesh just as the tokens do.
    vary = tokens.learning_rate[:, 0] + tokens.momentum[:, 0] + tokens.decay[:, 0]
    vary += (tokens.k[:, 0, :, 0] + tokens.v[:, 0, :, 0]).astype(vary.dtype)
    vary = jax.lax.stop_gradient(vary)
    start, still = (
        tuple(x.astype(vary.dtype) + 0 * vary[..., None, None] for x in layers)
        for layers in (state.weights, state.momentum)
    )
    return NeuralMemoryState(start, still, start, state.position)


def _check_gate(name: str, gate: Array, sizes: checks.Sizes, *, like: Array) -> None:
    shapes = [(sizes.B, sizes.T, heads) for heads in (sizes.N, sizes.K)]
    if gate.shape not in shapes or gate.shape != like.shape:
        expected = (
            f"shape [B,T,M] with B, T = {sizes.B, sizes.T}, M = N = {sizes.N} or K = {sizes.K},"
            " the same for all gates"
        )
        raise argument_error(name, expected, f"shape {gate.shape}")
    if not jnp.issubdtype(gate.dtype, jnp.floating):
        raise argument_error(name, "a floating-point dtype", gate.dtype)
    if isinstance(gate, jax.core.Tracer):
        return
    values, most = np.asarray(gate), np.inf if name == "learning_rate" else 1
    outside = values[~((values >= 0) & (values <= most) & np.isfinite(values))]
    if outside.size:
        expected = "finite values >= 0" if name == "learning_rate" else "values in [0, 1]"
        raise argument_error(name, expected, str(outside[0]))


def _check_weights(weights: Sequence[Array], sizes: checks.Sizes, states: int) -> None:
    if not isinstance(weights, list | tuple) or not 1 <= len(weights) <= DEEPEST:
        came = f"{len(weights)}" if isinstance(weights, list | tuple) else type(weights).__name__
        raise argument_error("weights", f"a list of 1 to {DEEPEST} layers", came)
    last = len(weights) - 1
    size = sizes.F
    for layer, matrix in enumerate(weights):
        name = f"weights[{layer}]"
        if not jnp.issubdtype(matrix.dtype, jnp.floating):
            raise argument_error(name, "a floating-point dtype", matrix.dtype)
        out = sizes.H if layer == last else matrix.shape[-1]
        if matrix.shape != (states, size, out) or out == 0:
            spelled = f"({states}, {size}, {sizes.H if layer == last else 'any'})"
            raise argument_error(name, f"shape [M,in,out] = {spelled}", f"shape {matrix.shape}")
        size = out
