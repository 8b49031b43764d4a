"""How local and routing heads make one layer, and what it learns outside the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn import nn, ops
from lcattn.ops.routing_attention import clusters

WIDTH, T = 16, 9


def _config(**fields):
    sizes = {"num_heads": 4, "num_clusters": 3, "cluster_size": 4, "window": 3}
    return nn.RoutingAttentionConfig(width=WIDTH, init_std=0.5, **(sizes | fields))


def _make(**fields):
    return _config(**fields).make(nnx.Rngs(0))


def _input(batch=2, length=T):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((batch, length, WIDTH)), jnp.float32)


def test_heads_of_both_kinds_share_one_output():
    mixer, x = _make(num_kv_heads=2, position_encoding="nope"), _input()
    q = mixer.query(x).reshape(2, T, 2, 4)
    v = mixer.value(x).reshape(2, T, 1, 4)
    routed = ops.routing_attention(q, v, mixer.centroids[...], cluster_size=4)
    near = ops.softmax_attention(*mixer.local.project(x), window=3)
    heads = jnp.concatenate([routed, near], axis=2).reshape(2, T, WIDTH)
    kernel = jnp.concatenate([mixer.out.kernel[...], mixer.local.out.kernel[...]])
    np.testing.assert_allclose(mixer(x), heads @ kernel, rtol=1e-4, atol=1e-5)


def test_clusters_are_of_content_whatever_the_position():
    mixer, x = _make(), _input()
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    np.testing.assert_allclose(mixer(x, None, positions + 100), mixer(x), rtol=1e-3, atol=1e-4)
    assert np.abs(mixer(x, None, 3 * positions) - mixer(x)).max() > 1e-2


def _statistics(mixer):
    return nnx.to_pure_dict(nnx.state(mixer, nnx.BatchStat))


def test_calls_in_training_move_the_centroids_and_others_do_not():
    mixer, x = _make(), _input()
    ids = jnp.zeros((2, T), jnp.int32).at[:, -2:].set(-1)
    before, out = _statistics(mixer), mixer(x, ids)
    jax.tree.map(np.testing.assert_array_equal, _statistics(mixer), before)

    mixer.train()
    np.testing.assert_allclose(mixer(x, ids), out, rtol=1e-5, atol=1e-6)
    q = clusters.normalize(mixer.query(x).reshape(2, T, 2, 4))
    old = clusters.Centroids(before["centroids"], before["centroid_weight"])
    assigned = clusters.nearest(clusters.affinities(q, old.mean))
    new = clusters.follow(old, clusters.tally(q, assigned, 3, ids), decay=0.999)
    np.testing.assert_allclose(mixer.centroids[...], new.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixer.centroid_weight[...], new.weight, rtol=1e-6)
    np.testing.assert_allclose(mixer.occupancy[...].sum(axis=-1), 1, rtol=1e-6)
    loss = 1e-4 * clusters.commitment_loss(q, old.mean, assigned, ids)
    np.testing.assert_allclose(nn.auxiliary_loss(mixer), loss, rtol=1e-5)
    assert nn.auxiliary_loss(mixer.local) == 0


def test_fitted_centroids_are_used():
    mixer, x = _make(), _input()
    before = mixer(x)
    mixer.fit_centroids(x, jax.random.key(1))
    norms = np.linalg.norm(mixer.centroids[...], axis=-1)
    np.testing.assert_allclose(norms, 2, rtol=1e-4)
    assert np.abs(mixer(x) - before).max() > 1e-3


def test_routing_heads_stream_without_local_heads():
    mixer, x = _make(num_local_heads=0), _input()
    first, state = mixer.extend(x[:, :-1], mixer.init_state(2, T))
    last, state = mixer.extend(x[:, -1:], state)
    assert state.local is None
    streamed = jnp.concatenate([first, last], axis=1)
    np.testing.assert_allclose(streamed, mixer(x), rtol=1e-4, atol=1e-5)


def test_state_does_not_grow():
    mixer = _make()
    assert mixer.state_bytes(10) == mixer.state_bytes(10_000)
    # Two heads of each kind: 3 clusters of 3 slots and their counts, a window of 3 and its length.
    assert mixer.state_bytes(10) == 4 * (2 * 3 * (3 * 8 + 1) + 2 * 3 * 8 + 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_clusters": 0}, "num_clusters: expected a value greater than 0"),
        ({"cluster_size": 0}, "cluster_size: expected a value greater than 0"),
        ({"window": -1}, "window: expected a value greater than 0"),
        ({"num_local_heads": 4}, "num_local_heads: expected a multiple of 1"),
        ({"num_local_heads": 1, "num_kv_heads": 2}, "num_local_heads: expected a multiple of 2"),
        ({"centroid_decay": 1.0}, "centroid_decay: expected a number from 0 to below 1"),
        ({"commitment_weight": -1.0}, "commitment_weight: expected a number of at least 0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        _config(**fields)


def test_what_does_not_stream_says_so():
    mixer = _make(strict=False)
    with pytest.raises(ValueError, match="strict: expected True to stream, got False"):
        mixer.init_state(1, 8)
    state = _make().init_state(2, 8)
    with pytest.raises(ValueError, match="strict: expected True to stream, got False"):
        mixer.extend(_input(), state)


def test_more_clusters_than_tokens_in_a_training_batch():
    mixer = _make(num_clusters=19)
    assert np.all(np.isfinite(mixer(_input())))
    mixer.train()
    with pytest.raises(ValueError, match="num_clusters: expected at most the 18 tokens, got 19"):
        mixer(_input())
