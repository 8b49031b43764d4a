"""Vectors on a sphere, the centroids near them, and how centroids follow the vectors (k-means)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.errors import argument_error
from lcattn.ops import checks
from lcattn.typing import Array, Float, Int, PRNGKeyArray, SegmentIds


class Centroids(NamedTuple):
    """Running means of the vectors that came to each cluster.

    Attributes:
      mean: `[N,C,F]`.
      weight: `[N,C]`, the running number of vectors that `mean` stands for.
    """

    mean: Float[Array, "N C F"]
    weight: Float[Array, "N C"]


class Tally(NamedTuple):
    """What came to each cluster in one batch: the number of vectors, and their sum."""

    count: Float[Array, "N C"]
    total: Float[Array, "N C F"]


def normalize(x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """LayerNorm without parameters, in float32: mean 0 and norm sqrt(F). Zeros stay zeros.

    On the sphere the nearest centroid is the one of the largest inner product, so that clustering
    and attention mean the same by "similar".
    """
    x = x.astype(checks.accumulation_dtype(x.dtype))
    x -= x.mean(axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def affinities(
    x: Float[Array, "B T N F"], centroids: Float[Array, "N C F"]
) -> Float[Array, "B N C T"]:
    """Inner products of normalised vectors with centroids, without a gradient.

    At full precision: a choice among clusters must come out the same in training and in a stream,
    which multiply matrices of other shapes.
    """
    x, centroids = lax.stop_gradient((x, centroids.astype(x.dtype)))
    return jnp.einsum("btnf,ncf->bnct", x, centroids, precision=lax.Precision.HIGHEST)


def nearest(affinity: Float[Array, "B N C T"]) -> Int[Array, "B N T"]:
    """The cluster of each token; of equally near ones the first."""
    return jnp.argmax(affinity, axis=2).astype(jnp.int32)


def initial_centroids(
    rng: PRNGKeyArray, num_heads: int, num_clusters: int, size: int
) -> Float[Array, "N C F"]:
    """Random points of the sphere."""
    return normalize(jax.random.normal(rng, (num_heads, num_clusters, size)))


def fit_centroids(
    x: Float[Array, "B T N F"], num_clusters: int, rng: PRNGKeyArray, *, num_iterations: int = 10
) -> Float[Array, "N C F"]:
    """Lloyd's algorithm on the sphere, from random tokens of `x`, which is normalised.

    Raises:
      ValueError: for more clusters than tokens.
    """
    B, T, N, F = x.shape
    _check_tokens(num_clusters, B * T)
    points = x.reshape(B * T, N, F)
    chosen = jax.random.choice(rng, B * T, (num_clusters,), replace=False)

    def iterate(_, centroids):
        count, total = tally(x, nearest(affinities(x, centroids)), num_clusters)
        return jnp.where(count[..., None] == 0, centroids, normalize(total))

    return lax.fori_loop(0, num_iterations, iterate, points[chosen].swapaxes(0, 1))


def tally(
    x: Float[Array, "B T N F"],
    clusters: Int[Array, "B N T"],
    num_clusters: int,
    segment_ids: SegmentIds | None = None,
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> Tally:
    """Counts and sums by cluster, over the real tokens of all rows.

    Under `jit` on a mesh, rows are those of all devices. Inside `shard_map` they are a device's
    own, and `axis_name` says over which mesh axes to add them up.
    """
    _check_tokens(num_clusters, x.shape[0] * x.shape[1])
    hot = jax.nn.one_hot(clusters, num_clusters, dtype=x.dtype)
    if segment_ids is not None:
        hot *= (segment_ids >= 0)[:, None, :, None]
    total = jnp.einsum("bntc,btnf->ncf", hot, x, precision=lax.Precision.HIGHEST)
    sums = Tally(hot.sum(axis=(0, 2)), total)
    return sums if axis_name is None else lax.psum(sums, axis_name)


def follow(centroids: Centroids, new: Tally, *, decay: float) -> Centroids:
    r"""One step of the running means.

    .. math::
        m' = \lambda m + (1 - \lambda) n, \qquad
        \mu' = \mu + \frac{1 - \lambda}{m'} \Bigl(\sum x - n \mu\Bigr)

    which is the ratio of the decaying sums of vectors and of counts, as published, in a form that
    leaves a cluster that nothing comes to exactly where it is, for ever.
    """
    mean, weight = centroids
    weight = decay * weight + (1 - decay) * new.count
    step = (1 - decay) / jnp.where(weight == 0, 1, weight)
    return Centroids(mean + step[..., None] * (new.total - new.count[..., None] * mean), weight)


def commitment_loss(
    x: Float[Array, "B T N F"],
    centroids: Float[Array, "N C F"],
    clusters: Int[Array, "B N T"],
    segment_ids: SegmentIds | None = None,
) -> Float[Array, ""]:
    """Mean squared distance of real tokens from their centroids, by channel.

    Its gradient draws the vectors to the centroids; centroids have none.
    """
    own = jax.vmap(lambda c, at: c[at], in_axes=(0, 1), out_axes=2)(centroids, clusters)
    distance = jnp.mean(jnp.square(x - lax.stop_gradient(own)), axis=(2, 3))
    if segment_ids is None:
        return distance.mean()
    is_real = segment_ids >= 0
    return jnp.sum(distance * is_real) / jnp.maximum(is_real.sum(), 1)


def _check_tokens(num_clusters: int, num_tokens: int) -> None:
    if num_clusters > num_tokens:
        raise argument_error("num_clusters", f"at most the {num_tokens} tokens", num_clusters)
