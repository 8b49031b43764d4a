"""Routing attention as a token mixer: local heads, and heads that route by content."""

import dataclasses
import functools
from typing import Any, no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.attention import AttentionConfig, KeyValueCache
from lcattn.nn.auxiliary import AuxiliaryLoss
from lcattn.nn.layers import merge_heads, projection, split_heads
from lcattn.nn.mixer import Mixer, check_stream, default_positions, stream_positions
from lcattn.nn.softmax_attention import SoftmaxAttentionConfig
from lcattn.ops import RoutingAttentionState
from lcattn.ops.routing_attention import clusters
from lcattn.ops.routing_attention.clusters import Centroids
from lcattn.traits import Traits
from lcattn.typing import Array, Float, Hidden, Positions, PRNGKeyArray, SegmentIds


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingState:
    """What a stream remembers; its size does not depend on the length.

    Attributes:
      routing: the last tokens of each cluster.
      local: the window of the local heads, if there are any.
    """

    routing: RoutingAttentionState
    local: KeyValueCache | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingAttentionConfig(AttentionConfig):
    """Routing Transformer (arXiv 2003.05997): heads attend within clusters, or to a window.

    Attributes:
      num_local_heads: query heads with a window; the rest route. None: half, as published. Each
        kind takes its share of the key/value heads.
      window: keys that a local head sees, the query's own included.
      num_clusters: C, of each routing head.
      cluster_size: tokens of its cluster that a token sees. Published: T / C, with T the length in
        training.
      strict: causal assignment (ours). False: balanced membership as published, which leaks which
        tokens are chosen, and does not stream.
      scale: factor of the routing heads' scores. None: `head_dim ** -0.5`; published: 1.
      spherical: put centroids on the sphere where tokens are assigned to them, as k-means on a
        sphere does. Published: no, so that centroids with large norms draw more tokens.
      centroid_decay: of the running means, for each call in training.
      commitment_weight: of the mean squared distance between tokens and their centroids, in the
        objective.
      axis_name: mesh axes over which a surrounding `shard_map` splits the batch. Under `jit`,
        batches on a mesh need nothing.
    """

    num_local_heads: int | None = None
    window: int = 512
    num_clusters: int = 16
    cluster_size: int = 256
    strict: bool = True
    scale: float | None = None
    spherical: bool = True
    centroid_decay: float = 0.999
    commitment_weight: float = 1e-4
    axis_name: str | tuple[str, ...] | None = None

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("window", "num_clusters", "cluster_size", "scale")
        if not 0 <= self.local_heads < self.num_heads or self.local_heads % self._shared:
            expected = f"a multiple of {self._shared}, the query heads that share a key, from 0 to "
            raise self.error("num_local_heads", f"{expected}{self.num_heads - self._shared}")
        if not 0 <= self.centroid_decay < 1:
            raise self.error("centroid_decay", "a number from 0 to below 1")
        if self.commitment_weight < 0:
            raise self.error("commitment_weight", "a number of at least 0")

    @property
    def local_heads(self) -> int:
        """Query heads with a window."""
        if self.num_local_heads is None:
            return self.kv_heads // 2 * self._shared
        return self.num_local_heads

    @property
    def routing_heads(self) -> int:
        """Query heads that route."""
        return self.num_heads - self.local_heads

    @property
    def local(self) -> SoftmaxAttentionConfig | None:
        """The local heads as a layer of their own, or None."""
        if not self.local_heads:
            return None
        return SoftmaxAttentionConfig(
            num_heads=self.local_heads, num_kv_heads=self.local_heads // self._shared,
            head_dim=self.head_size, window=self.window, qk_norm=self.qk_norm,
            position_encoding=self.position_encoding, rope_base=self.rope_base,
            rope_size=self.rope_size, implementation=self.implementation,
        ).inherit(self)  # fmt: skip

    @property
    def _shared(self) -> int:
        return self.num_heads // self.kv_heads

    def make(self, rngs: nnx.Rngs) -> "RoutingAttention":
        """Builds the mixer."""
        return RoutingAttention(self, rngs)


class RoutingAttention(Mixer):
    """`y = Wo · routing_attention(Wq x, Wv x, centroids) + local(x)`, without biases.

    That is one output projection of all heads side by side, written as two. Positions are encoded
    after routing: clusters are of content.

    In training (`model.train()`, or `use_running_average=False`) a call also moves the centroids
    towards the tokens that came to them, outside the gradient, and writes the commitment loss.
    Like the running statistics of a batch norm, centroids are variables that a training step must
    carry on; `lcattn.training` does, and adds the loss to the objective.

    Attributes:
      centroids, centroid_weight: `[N,C,H]` and `[N,C]`, running means and what they stand for.
      commitment_loss: of the last call in training, with its weight.
      occupancy: `[N,C]`, the share of that call's tokens in each cluster. Watch its extremes.
      use_running_average: False in training.
    """

    op = "routing_attention"
    time = "T·(c + w)"

    def __init__(self, config: RoutingAttentionConfig, rngs: nnx.Rngs):
        """Args: `config`, with its width set; `rngs`, for parameters and centroids."""
        self.config = config
        width, H = config.require_width(), config.head_size
        N, C = config.routing_heads, config.num_clusters
        K = N * config.kv_heads // config.num_heads
        self.query = projection(config, width, N * H, axes=("embed", "heads"), rngs=rngs)
        self.value = projection(config, width, K * H, axes=("embed", "heads"), rngs=rngs)
        self.out = projection(
            config, N * H, width, axes=("heads", "embed"), rngs=rngs, is_output=True
        )
        self.local = config.local.make(rngs) if config.local else None
        self.centroids = nnx.BatchStat(clusters.initial_centroids(rngs.params(), N, C, H))
        # Published: 0, after which the first batch decides alone, divided by far too little.
        self.centroid_weight = nnx.BatchStat(jnp.ones((N, C), jnp.float32))
        self.commitment_loss = AuxiliaryLoss(jnp.zeros((), jnp.float32))
        self.occupancy = nnx.BatchStat(jnp.zeros((N, C), jnp.float32))
        self.use_running_average = True

    @property
    def traits(self) -> Traits:
        """Causal and streaming where strict."""
        strict = self.config.strict
        return Traits(causal=strict, streaming=strict, subquadratic=True)

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences, and in training learns from them.

        Raises:
          ValueError: in training, for more clusters than tokens in the batch.
        """
        index = default_positions(x, segment_ids) if positions is None else positions
        q = split_heads(self.query(x), self.config.routing_heads)
        heads = self._attend(x, q, index, segment_ids=segment_ids)
        if not self.use_running_average:
            self._learn(q, segment_ids)
        mixed = self.out(merge_heads(heads))
        return mixed if self.local is None else mixed + self.local(x, segment_ids, index)

    def fit_centroids(self, x: Hidden, rng: PRNGKeyArray, *, num_iterations: int = 10) -> None:
        """Starts the centroids from data: k-means on the tokens of `x [B,T,D]`.

        Raises:
          ValueError: for more clusters than tokens.
        """
        q = clusters.normalize(split_heads(self.query(x), self.config.routing_heads))
        self.centroids[...] = clusters.fit_centroids(
            q, self.config.num_clusters, rng, num_iterations=num_iterations
        )

    def init_state(self, batch_size: int, max_length: int, dtype=None) -> RoutingState:
        """Nothing in any cluster yet, and an empty window.

        Raises:
          ValueError: if the mixer is not strict, and so does not stream.
        """
        config = self.config
        self._require_strict()
        local = None if self.local is None else self.local.init_state(batch_size, max_length, dtype)
        routing = ops.routing_attention_state(
            batch_size, config.routing_heads, config.num_clusters, config.cluster_size,
            config.head_size, config.head_size, dtype=dtype or config.dtype or "float32",
        )  # fmt: skip
        return RoutingState(routing, local)

    def extend(self, x: Hidden, state: RoutingState) -> tuple[Hidden, RoutingState]:
        """Continues each stream.

        Raises:
          ValueError: if the mixer is not strict, or the state holds another number of streams.
        """
        self._require_strict()
        check_stream(x, state.routing.count)
        # Every token is in one cluster of every head.
        length = state.routing.count[:, 0].sum(axis=-1, keepdims=True)
        q = split_heads(self.query(x), self.config.routing_heads)
        heads, routing = self._attend(
            x, q, stream_positions(x, length), initial_state=state.routing, return_state=True
        )
        mixed, local = self.out(merge_heads(heads)), None
        if self.local is not None:
            assert state.local is not None
            near, local = self.local.extend(x, state.local)
            mixed += near
        return mixed, RoutingState(routing, local)

    def _attend(self, x: Hidden, q: Array, positions: Positions, **options: Any) -> Any:
        config = self.config
        encode = None
        if config.position_encoding == "rope":
            encode = functools.partial(
                ops.rotary, positions=positions, base=config.rope_base, size=config.rope_size
            )
        v = split_heads(self.value(x), config.routing_heads * config.kv_heads // config.num_heads)
        return ops.routing_attention(
            q, v, self._places(),
            cluster_size=config.cluster_size, strict=config.strict, scale=config.scale,
            encode=encode, implementation=config.implementation, **options,
        )  # fmt: skip

    def _places(self) -> Float[Array, "N C H"]:
        """The centroids that tokens are assigned to."""
        mean = self.centroids[...]
        return clusters.normalize(mean) if self.config.spherical else mean

    def _learn(self, q: Array, segment_ids: SegmentIds | None) -> None:
        config, places = self.config, self._places()
        x = clusters.normalize(q)
        assigned = clusters.nearest(clusters.affinities(x, places))
        distance = clusters.commitment_loss(x, places, assigned, segment_ids)
        new = clusters.tally(
            jax.lax.stop_gradient(x), assigned, config.num_clusters, segment_ids,
            axis_name=config.axis_name,
        )  # fmt: skip
        old = Centroids(self.centroids[...], self.centroid_weight[...])
        mean, weight = clusters.follow(old, new, decay=config.centroid_decay)
        self.centroids[...], self.centroid_weight[...] = mean, weight
        self.commitment_loss[...] = config.commitment_weight * distance
        self.occupancy[...] = new.count / jnp.maximum(new.count.sum(-1, keepdims=True), 1)

    def _require_strict(self) -> None:
        if not self.config.strict:
            raise self.config.error("strict", "True to stream")
