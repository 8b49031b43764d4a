"""K-means on the sphere: how centroids follow the tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lcattn.ops.routing_attention import clusters
from lcattn.ops.routing_attention.clusters import Centroids

B, T, N, C, F = 2, 9, 2, 3, 4


def _tokens(seed=0, batch=B):
    rng = np.random.default_rng(seed)
    return clusters.normalize(jnp.asarray(rng.standard_normal((batch, T, N, F)), jnp.float32))


def _start(weight=1.0):
    mean = clusters.initial_centroids(jax.random.key(0), N, C, F)
    return Centroids(mean, jnp.full((N, C), weight, jnp.float32))


def _step(centroids, x, segment_ids=None, *, decay=0.9, axis_name=None):
    assigned = clusters.nearest(clusters.affinities(x, centroids.mean))
    new = clusters.tally(x, assigned, C, segment_ids, axis_name=axis_name)
    return clusters.follow(centroids, new, decay=decay)


def test_the_running_means_are_a_ratio_of_decaying_sums():
    """A loop over tokens in float64, in the published form; padding counts for nothing."""
    ids = np.zeros((B, T), np.int32)
    ids[0, -3:] = ids[1, :2] = -1
    found = _start()
    mean, weight = (np.asarray(x, np.float64) for x in found)
    sums = mean * weight[..., None]
    for seed in range(3):
        x = _tokens(seed)
        found = _step(found, x, jnp.asarray(ids))
        new_count, new_sum = np.zeros_like(weight), np.zeros_like(sums)
        for b, t, n in np.ndindex(B, T, N):
            if ids[b, t] >= 0:
                c = np.argmax(mean[n] @ np.asarray(x[b, t, n], np.float64))
                new_count[n, c] += 1
                new_sum[n, c] += x[b, t, n]
        weight, sums = 0.9 * weight + 0.1 * new_count, 0.9 * sums + 0.1 * new_sum
        mean = sums / weight[..., None]
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.weight, weight, rtol=1e-5)


def test_a_cluster_that_nothing_comes_to_stays_where_it_is():
    """Published: its sums decay to nothing, and the ratio with them."""
    start = _start()
    nothing = clusters.Tally(jnp.zeros((N, C)), jnp.zeros((N, C, F)))
    forgotten = jax.lax.fori_loop(
        0, 500, lambda _, c: clusters.follow(c, nothing, decay=0.5), start
    )
    assert np.all(forgotten.weight == 0)
    np.testing.assert_array_equal(forgotten.mean, start.mean)
    x = _tokens()
    found = clusters.follow(
        forgotten, clusters.Tally(jnp.ones((N, C)), x[0, :C].swapaxes(0, 1)), decay=0.5
    )
    np.testing.assert_allclose(found.mean, x[0, :C].swapaxes(0, 1), rtol=1e-6)


def test_the_first_batch_does_not_blow_centroids_up():
    """Published: counts start at 0, sums at the centroids, so mu = 999 mu / count + mean."""
    x, start = _tokens(), _start()
    count = clusters.tally(x, clusters.nearest(clusters.affinities(x, start.mean)), C).count
    published = np.linalg.norm(start.mean, axis=-1) * 999 / np.maximum(count, 1)
    assert published.min() > 50 * F**0.5
    found = _step(start, x, decay=0.999).mean
    assert np.linalg.norm(found, axis=-1).max() < 1.01 * F**0.5


def test_norms_of_centroids_draw_tokens_unless_they_are_put_on_the_sphere():
    x, mean = _tokens(), _start().mean
    large = mean.at[:, 1].multiply(100)

    def share(centroids):
        return float(jnp.mean(clusters.nearest(clusters.affinities(x, centroids)) == 1))

    assert share(clusters.normalize(large)) == share(mean)
    assert share(large) != share(mean)


def test_two_devices_equal_one():
    """Inside `shard_map` by `axis_name`; under `jit` without a word."""
    x, start = _tokens(batch=4), _start()
    expected = _step(start, x)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    rows, copies = PartitionSpec("data"), PartitionSpec()
    apart = jax.shard_map(
        functools.partial(_step, axis_name="data"),
        mesh=mesh, in_specs=(copies, rows), out_specs=copies,
    )  # fmt: skip
    spread = jax.device_put(x, jax.NamedSharding(mesh, rows))
    for found in (jax.jit(apart)(start, x), jax.jit(_step)(start, spread)):
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-6)


def test_the_commitment_loss_draws_tokens_only():
    x, mean = _tokens(), _start().mean
    ids = jnp.zeros((B, T), jnp.int32).at[0, -3:].set(-1)
    assigned = clusters.nearest(clusters.affinities(x, mean))
    value, (d_x, d_mean) = jax.value_and_grad(clusters.commitment_loss, (0, 1))(
        x, mean, assigned, ids
    )
    own = np.stack([np.asarray(mean)[n, assigned[:, n]] for n in range(N)], axis=2)
    difference = (x - own) * (ids >= 0)[..., None, None]
    number = int(jnp.sum(ids >= 0)) * N * F
    np.testing.assert_allclose(value, np.sum(difference**2) / number, rtol=1e-5)
    np.testing.assert_allclose(d_x, 2 * difference / number, rtol=1e-5, atol=1e-7)
    assert not np.any(d_mean)
    nothing = clusters.commitment_loss(x, mean, assigned, jnp.full((B, T), -1))
    assert nothing == 0


def test_fitted_centroids_find_the_clusters():
    true = clusters.normalize(4 * jnp.eye(C, F))
    x = true[jnp.arange(24) % C] + 0.1 * jax.random.normal(jax.random.key(1), (24, F))
    x = clusters.normalize(x)[None, :, None]
    found = clusters.fit_centroids(x, C, jax.random.key(3))[0]
    nearness = np.sort(np.asarray(found @ true.T) / F, axis=0)[-1]
    assert np.all(nearness > 0.98)


def test_more_clusters_than_tokens():
    x = _tokens()
    with pytest.raises(ValueError, match="num_clusters: expected at most the 18 tokens, got 19"):
        clusters.fit_centroids(x, 19, jax.random.key(0))
    with pytest.raises(ValueError, match="num_clusters: expected at most the 18 tokens, got 19"):
        clusters.tally(x, jnp.zeros((B, N, T), jnp.int32), 19)
