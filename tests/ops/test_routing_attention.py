"""What only routing attention must hold, and what the published code gets wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

attend = functools.partial(ops.routing_attention, implementation="reference")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _draw(T=17, *, N=2, K=2, C=3, H=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (1, T, N, H), (1, T, K, H), (N, C, H)
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


def _normalized(q):
    centred = q - q.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


def _separated(T=12, C=3):
    """Tokens of C clusters in turn, each beside its centroid, in equal numbers."""
    centroids = _normalized(4 * np.eye(C, 4))[None]
    turns = np.random.default_rng(0).permutation(np.tile(np.arange(C), T // C))
    q = centroids[:, turns] + 0.1 * np.random.default_rng(1).standard_normal((1, T, 4))
    return jnp.asarray(q[:, :, None]), _draw(T, N=1, K=1)[1], jnp.asarray(centroids), turns


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("cluster_size", [17, 100])
def test_one_cluster_of_all_tokens_is_softmax_attention(strict, cluster_size):
    """Also to the last digit of the mean: published, outputs shrink by 1/1.01."""
    q, v, centroids = _draw(C=1)
    out = attend(q, v, centroids, cluster_size=cluster_size, strict=strict)
    x = _normalized(q)
    expected = ops.softmax_attention(x, x, v, implementation="reference")
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-13)


def test_equal_centroids_are_one_cluster():
    q, v, centroids = _draw()
    one = centroids[:, :1]
    options = {"cluster_size": 5, "strict": False}
    out = attend(q, v, jnp.repeat(one, 3, axis=1), **options)
    np.testing.assert_allclose(out, attend(q, v, one, **options), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("strict", [True, False])
def test_the_order_of_clusters_does_not_matter(strict):
    q, v, centroids = _draw()
    options = {"cluster_size": 5, "strict": strict}
    out = attend(q, v, centroids[:, jnp.asarray([2, 0, 1])], **options)
    np.testing.assert_allclose(out, attend(q, v, centroids, **options), rtol=1e-10, atol=1e-13)


def test_without_causality_the_order_of_tokens_does_not_matter():
    q, v, centroids = _draw()
    order = np.random.default_rng(0).permutation(17)
    options = {"cluster_size": 5, "causal": False}
    out = attend(q[:, order], v[:, order], centroids, **options)
    expected = attend(q, v, centroids, **options)[:, order]
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-13)


def _change_of_the_past(*, strict, of_queries):
    """The largest change of outputs before token 9 when it and later tokens change."""
    q, v, centroids = _draw()
    changed_q, changed_v = (x.at[:, 9:].multiply(-3) for x in (q, v))
    run = functools.partial(attend, centroids=centroids, cluster_size=5, strict=strict)
    after = run(changed_q, v) if of_queries else run(q, changed_v)
    return np.abs(after - run(q, v))[:, :9].max()


def test_published_membership_leaks_and_strict_assignment_does_not():
    """Which past tokens are seen depends on later queries; their values never come through."""
    assert _change_of_the_past(strict=False, of_queries=True) > 1e-2
    assert _change_of_the_past(strict=False, of_queries=False) == 0
    assert _change_of_the_past(strict=True, of_queries=True) == 0
    assert _change_of_the_past(strict=True, of_queries=False) == 0


def test_published_steps_differ_from_the_whole_sequence():
    """The official decoder re-runs each prefix, where at first every cluster holds every token."""
    q, v, centroids = _draw()
    steps = jnp.arange(17)
    prefixes = jnp.where(steps <= steps[:, None], 0, -1)  # one a row, the rest padding
    rows = [jnp.repeat(x, 17, axis=0) for x in (q, v)]
    for strict in (True, False):
        run = functools.partial(attend, centroids=centroids, cluster_size=5, strict=strict)
        streamed = run(*rows, segment_ids=prefixes)[steps, steps]
        assert np.allclose(streamed, run(q, v)[0], rtol=1e-9, atol=1e-12) == strict


def test_balanced_clusters_make_both_forms_one():
    """Every token is in one cluster, of as many tokens as it holds."""
    q, v, centroids, turns = _separated()
    forms = [attend(q, v, centroids, cluster_size=4, strict=strict) for strict in (True, False)]
    np.testing.assert_allclose(*forms, rtol=1e-10, atol=1e-13)
    first = [np.flatnonzero(turns == c)[0] for c in range(3)]
    np.testing.assert_allclose(forms[0][:, first], v[:, first], rtol=1e-12)


def test_tokens_of_no_cluster_give_zeros_and_have_no_gradient():
    q, v, centroids = _draw(C=1)

    def run(q, v):
        return attend(q, v, centroids, cluster_size=4, strict=False)

    out, pull_back = jax.vjp(run, q, v)
    lost = ~np.any(np.asarray(out[0]) != 0, axis=-1)
    assert np.all(lost.sum(axis=0) == 13)
    for gradient in pull_back(jnp.ones_like(out)):
        assert not np.any(np.asarray(gradient)[0][lost])


@pytest.mark.parametrize("strict", [True, False])
def test_more_clusters_than_tokens_are_well_defined(strict):
    """A lone token hears itself, undiminished: the mean is over the clusters that it is in."""
    q, v, centroids = _draw(1, C=8)
    out = attend(q, v, centroids, cluster_size=4, strict=strict)
    np.testing.assert_allclose(out, v, rtol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_of_equally_near_tokens_the_first_are_taken(implementation):
    _, v, centroids = _draw(7, C=2)
    q = jnp.ones((1, 7, 2, 4)) * jnp.asarray([1.0, 2.0, 3.0, 4.0])
    out = ops.routing_attention(
        q, v, centroids, cluster_size=3, strict=False, implementation=implementation
    )
    means = np.cumsum(v, axis=1)[:, :3] / np.arange(1, 4)[:, None, None]
    np.testing.assert_allclose(out[:, :3], means, rtol=1e-12)
    assert not np.any(out[:, 3:])


@pytest.mark.parametrize("strict", [True, False])
def test_norms_of_queries_do_not_matter(strict):
    q, v, centroids = _draw()
    run = functools.partial(attend, centroids=centroids, cluster_size=5, strict=strict)
    np.testing.assert_allclose(run(1e4 * q, v), run(q, v), rtol=1e-4, atol=1e-6)
    out, pull_back = jax.vjp(run, jnp.zeros_like(q), v)
    assert all(np.all(np.isfinite(x)) for x in (out, *pull_back(out)))


def test_positions_enter_after_routing():
    """The PyTorch port rotates first: its clusters, and its values, depend on the position."""
    q, v, centroids = _draw()

    def run(start):
        encode = functools.partial(ops.rotary, positions=start + jnp.arange(17)[None])
        return attend(q, v, centroids, cluster_size=5, encode=encode)

    np.testing.assert_allclose(run(0), run(1000), rtol=1e-9, atol=1e-12)
    assert np.abs(run(0) - attend(q, v, centroids, cluster_size=5)).max() > 1e-2


def _extended(q, v, centroids, lengths, **options):
    state, out, start = None, [], 0
    for length in lengths:
        piece = slice(start, start + length)
        y, state = attend(
            q[:, piece], v[:, piece], centroids, initial_state=state, return_state=True, **options
        )
        out.append(y)
        start += length
    return jnp.concatenate(out, axis=1), state


@pytest.mark.parametrize(
    ("lengths", "cluster_size"), [([1] * 4 + [13], 4), ([5, 7, 5], 4), ([5, 12], 1)]
)
def test_a_stream_in_pieces_equals_one_call(lengths, cluster_size):
    q, v, centroids = _draw(N=4)
    out, state = _extended(q, v, centroids, lengths, cluster_size=cluster_size)
    expected = attend(q, v, centroids, cluster_size=cluster_size)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)
    assert np.all(state.count.sum(axis=-1) == 17)
    assert state.k.shape == (1, 4, 3, cluster_size - 1, 4)


def test_packed_rows_take_turns_at_clusters():
    """Each document sends its own w tokens to a cluster, T at most; they are not held at once."""
    T, H, C = 1024, 64, 64

    def loss(q, v, centroids, ids):
        return jnp.sum(
            ops.routing_attention(q, v, centroids, cluster_size=64, strict=False, segment_ids=ids)
        )

    x = jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32)
    centroids = jax.ShapeDtypeStruct((1, C, H), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, x, centroids, ids).compile()
    all_at_once = 3 * C * T * H * 4  # bytes of gathered queries, values and outputs
    assert compiled.memory_analysis().temp_size_in_bytes < all_at_once / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster_size": 0}, "cluster_size: expected a whole number of at least 1, got 0"),
        ({"causal": False, "strict": True}, "strict: expected False where causal is False"),
        ({"strict": False, "return_state": True}, "strict: expected True with a state"),
        ({"scale": float("nan")}, "scale: expected a finite Python float"),
        (
            {"return_state": True, "segment_ids": jnp.zeros((1, 17), jnp.int32)},
            "segment_ids: expected None with a state",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        attend(*_draw(), **{"cluster_size": 4, **options})


@pytest.mark.usefixtures("no_type_hook")
def test_bad_arrays():
    q, v, centroids = _draw(N=4)
    for arrays, message in (
        ((q, v, centroids[0]), r"centroids: expected 3 axes \[N,C,F\]"),
        ((q, v, centroids[:, :0]), r"centroids: expected 3 axes \[N,C,F\], none empty"),
        ((q, v, centroids[:2]), r"centroids: expected shape \[N,C,F\] = \(4, 3, 4\)"),
        ((q, v[:, :5], centroids), "v: expected B=1 and T=17 as in q"),
        ((q, v[:, :, :0], centroids), "v: expected no empty axis"),
        ((q[:, :, :3], v, centroids[:3]), "v: expected a number of heads K that divides the N=3"),
        ((q, v.astype("float32"), centroids), "v: expected the dtype of q, float64"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(*arrays, cluster_size=4)
    state = ops.routing_attention_state(1, 4, 3, 5, 4, 4)
    with pytest.raises(ValueError, match=r"initial_state\.k: expected shape"):
        attend(q, v, centroids, cluster_size=4, initial_state=state)
