"""What only CCA must hold, and what the published code gets wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

from lcattn.ops import core_context_attention

attend = functools.partial(ops.core_context_attention, implementation="reference")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _draw(T=17, *, N=2, K=2, H=4, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((1, T, heads, H)), dtype) for heads in (N, K, K))


def _times_read(T, group_size, window):
    """How much each query reads of each token `[T,T]`, with equal scores: cores and tokens."""
    zeros = jnp.zeros((1, T, 1, 1), jnp.float64)
    units = jnp.eye(T)[None, :, None]
    out = attend(zeros, zeros, units, group_size=group_size, window=window)[0, :, 0]
    far = np.maximum(0, (np.arange(1, T + 1) - window) // group_size)
    # Each of the `far` cores and of the other tokens has one share; a core spreads it over g.
    shares = far + np.arange(1, T + 1) - far * group_size
    return np.asarray(out) * shares[:, None]


@pytest.mark.parametrize(
    ("group_size", "window"), [(4, 6), (4, 4), (3, 5), (5, 2), (1, 3), (16, 1)]
)
def test_every_past_token_counts_once(group_size, window):
    """Also where g does not divide the window: the published kernel repeats and loses tokens."""
    T = 20
    read = _times_read(T, group_size, window)
    far = group_size * np.maximum(0, (np.arange(1, T + 1) - window) // group_size)
    position = np.arange(T)
    expected = np.where(position < far[:, None], 1 / group_size, 1.0) * (
        position <= position[:, None]
    )
    np.testing.assert_allclose(read, expected, atol=1e-12)


def test_the_published_windows_do_not_cover_the_past():
    """Kernel: s + (i mod g) local tokens. With g=4, s=6, query 8 misses two tokens."""
    i, g, s = 8, 4, 6
    covered = g * max(0, (i - s) // g) + s + i % g
    assert covered == 6
    assert np.count_nonzero(_times_read(8, g, s)[i - 1]) == 8


def test_no_core_is_seen_before_its_window_has_passed():
    """Published: division towards zero shows core 0 to rows s..s+g-2, with the future in it."""
    g, s, T = 8, 2, 20
    rows = np.arange(T)
    towards_zero = np.trunc((rows - s) / g).astype(int) + 1  # cores the kernel shows
    newest = np.where(rows >= s, towards_zero * g - 1, -1)
    assert np.any(newest > rows)  # it leaks
    q, k, v = _draw(T)
    jacobian = jax.jacrev(lambda v: attend(q, k, v, group_size=g, window=s)[0, :, 0, 0])(v)
    reads = np.any(np.asarray(jacobian)[:, 0] != 0, axis=(2, 3))
    assert not np.any(np.triu(reads, 1))
    assert np.all(reads[rows, rows])


@pytest.mark.parametrize(("group_size", "window"), [(1, 3), (4, 17), (32, 2)])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_softmax_attention_is_a_special_case(group_size, window, implementation):
    """One token a group (one more token counted by the paper's equation), or no group that ends."""
    q, k, v = _draw(N=4)
    out = ops.core_context_attention(
        q, k, v, group_size=group_size, window=window, implementation=implementation
    )
    expected = ops.softmax_attention(q, k, v, implementation="reference")
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)


def test_a_core_is_pooled_by_the_query_of_its_last_token():
    q, k, v = _draw(6, N=1, K=1)
    swapped = [x.at[:, [0, 1]].set(x[:, [1, 0]]) for x in (q, k, v)]
    last = [x.at[:, [2, 1]].set(x[:, [1, 2]]) for x in (q, k, v)]
    read = [attend(*x, group_size=3, window=1)[0, 5] for x in ((q, k, v), swapped, last)]
    np.testing.assert_allclose(read[0], read[1], rtol=1e-12)
    assert np.abs(read[0] - read[2]).max() > 1e-3


def test_shared_cores_are_scored_by_the_mean_query():
    q, k, v = _draw(N=2, K=1)
    same = jnp.broadcast_to(q.mean(axis=2, keepdims=True), q.shape)
    options = {"group_size": 4, "window": 2}
    np.testing.assert_allclose(
        attend(same, k, v, share_cores=True, **options), attend(same, k, v, **options), rtol=1e-12
    )
    assert (
        np.abs(attend(q, k, v, share_cores=True, **options) - attend(q, k, v, **options)).max()
        > 0.01
    )


def _extended(q, k, v, lengths, **options):
    state = ops.core_context_attention_state(
        1, q.shape[1], q.shape[2], k.shape[2], 4, 4, dtype=q.dtype, **options
    )
    out, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        y, state = attend(
            q[:, piece], k[:, piece], v[:, piece],
            initial_state=state, return_state=True, **options,
        )  # fmt: skip
        out.append(y)
        start += length
    return jnp.concatenate(out, axis=1), state


@pytest.mark.parametrize("lengths", [[1] * 17, [5, 7, 1, 4], [16, 1]])
def test_a_stream_in_pieces_equals_one_call(lengths):
    """Published: a second prompt chunk miscounts its groups, and steps pool the first group."""
    q, k, v = _draw(N=4)
    for share_cores in (False, True):
        options = {"group_size": 3, "window": 4, "share_cores": share_cores}
        out, _ = _extended(q, k, v, lengths, **options)
        np.testing.assert_allclose(out, attend(q, k, v, **options), rtol=1e-9, atol=1e-12)


def test_state_keeps_no_queries():
    """Bytes of a 128k stream, as a share of a key/value cache: 7% with one head or shared cores."""

    def share(heads, kv_heads, **options):
        state = jax.eval_shape(
            lambda: ops.core_context_attention_state(1, 131072, heads, kv_heads, 64, 64, **options)
        )
        held = sum(np.prod(x.shape) for x in jax.tree.leaves(state))
        return held / (2 * 131072 * kv_heads * 64)

    assert share(8, 8) == pytest.approx(0.070, abs=1e-3)
    assert share(32, 8) == pytest.approx(0.258, abs=2e-3)
    assert share(32, 8, share_cores=True) == pytest.approx(0.070, abs=1e-3)


def test_prefixes_give_the_same():
    """Published training rounds the number of groups down to a multiple of 64."""
    q, k, v = _draw()
    options = {"group_size": 3, "window": 4}
    whole = attend(q, k, v, **options)
    for t in (1, 6, 7, 13):
        np.testing.assert_allclose(
            attend(q[:, :t], k[:, :t], v[:, :t], **options), whole[:, :t], rtol=1e-10, atol=1e-13
        )


def test_memory_of_a_gradient_grows_with_the_length_only():
    def gradient_memory(T):
        x = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)

        def loss(*x):
            return jnp.sum(ops.core_context_attention(*x, group_size=8, window=64))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert gradient_memory(8192) < 2.5 * gradient_memory(4096)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size: expected a whole number of at least 1, got 0"),
        ({"window": 0}, "window: expected a whole number of at least 1"),
        ({"causal": False}, "causal: expected True"),
        ({"return_state": True}, "initial_state: expected a state to continue"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        attend(*_draw(), **options)


def test_states_that_do_not_fit():
    attend, (q, k, v) = core_context_attention, _draw()  # under jit, no length is known
    state = ops.core_context_attention_state(1, 16, 2, 2, 4, 4, group_size=3, window=4)
    with pytest.raises(ValueError, match="state: expected room for 17 tokens, got max_length=16"):
        attend(q, k, v, group_size=3, window=4, initial_state=state)
    with pytest.raises(ValueError, match=r"initial_state\.k: expected shape"):
        attend(q[:, :4], k[:, :4], v[:, :4], group_size=3, window=5, initial_state=state)
    with pytest.raises(ValueError, match="segment_ids: expected None with an initial_state"):
        attend(
            q[:, :4], k[:, :4], v[:, :4], group_size=3, window=4, initial_state=state,
            segment_ids=jnp.zeros((1, 4), jnp.int32),
        )  # fmt: skip
