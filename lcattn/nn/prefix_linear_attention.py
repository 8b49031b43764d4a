"""Linear attention that reads a prefix before it starts, as a token mixer: JRT-RNN."""

import dataclasses
from typing import Any, no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.layers import projection, split_heads
from lcattn.nn.linear_attention import FeatureMapConfig, FeatureMapMixer
from lcattn.nn.mixer import check_stream
from lcattn.ops import LinearAttentionState, segment_positions
from lcattn.traits import Traits
from lcattn.typing import Array, Hidden, Int, Positions, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLinearAttentionConfig(FeatureMapConfig):
    """JRT (arXiv 2407.05483): linear attention that reads a prefix both ways before it starts.

    Attributes:
      prefix_length: tokens M at the start of each document that all of its tokens see. Shorter
        documents are prefix throughout.
    """

    prefix_length: int = 1024

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("prefix_length")

    def make(self, rngs: nnx.Rngs) -> "PrefixLinearAttention":
        """Builds the mixer."""
        return PrefixLinearAttention(self, rngs)


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixLinearAttentionState:
    """What prefix linear attention remembers.

    Attributes:
      sums: over the prefix and over all tokens, in float32.
      length: number of tokens seen, a scalar int32.
    """

    sums: LinearAttentionState
    length: Int[Array, ""]


class PrefixLinearAttention(FeatureMapMixer[PrefixLinearAttentionConfig]):
    """`LinearAttention` with a second set of keys and values, those of the prefix.

    Tokens of a prefix see each other both ways, so it is not causal there; train it with
    `lcattn.tasks.mask_prefix`, which asks for no prediction that the input already answers.

    A prefix is read at once: **the first call of `extend` encodes the prefix**, the first
    `prefix_length` of its tokens, or all if it has fewer. Later calls are causal. So the law of
    streaming holds for streams whose first call brings the whole prefix, and
    `traits.streaming` is False.
    """

    op = "prefix_linear_attention"
    time = "T·(C + F²)"

    @override
    def __init__(self, config: PrefixLinearAttentionConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        width, K = config.require_width(), config.kv_heads
        F, H = config.feature_dim, config.head_size
        self.prefix_key = projection(config, width, K * F, axes=("embed", "heads"), rngs=rngs)
        self.prefix_value = projection(config, width, K * H, axes=("embed", "heads"), rngs=rngs)

    @property
    def traits(self) -> Traits:
        """Linear in the length; causal and streaming after the prefix only."""
        return Traits(causal=False, streaming=False, subquadratic=True)

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences; `positions` do not matter."""
        del positions
        M = self.config.prefix_length
        if segment_ids is None:
            return self.project_out(self._attend(x, prefix=x[:, :M]))
        mask = segment_positions(segment_ids) < M
        heads = self._attend(x, prefix=x, prefix_mask=mask, segment_ids=segment_ids)
        return self.project_out(heads)

    def init_state(
        self, batch_size: int, max_length: int, dtype=None
    ) -> PrefixLinearAttentionState:
        """Zeros, in float32 whatever `dtype`."""
        del max_length, dtype
        return PrefixLinearAttentionState(self.zero_sums(batch_size), jnp.zeros((), jnp.int32))

    def extend(
        self, x: Hidden, state: PrefixLinearAttentionState
    ) -> tuple[Hidden, PrefixLinearAttentionState]:
        """Continues each stream; the first call encodes the prefix."""
        check_stream(x, state.sums.kv)
        prefix = x[:, : self.config.prefix_length]
        heads, sums = self._attend(
            x,
            prefix=prefix,
            prefix_mask=jnp.broadcast_to(state.length == 0, prefix.shape[:2]),
            initial_state=state.sums,
            return_state=True,
        )
        return self.project_out(heads), PrefixLinearAttentionState(sums, state.length + x.shape[1])

    def _attend(self, x: Array, *, prefix: Array, **options: Any) -> Any:
        q, k, v = self.project(x)
        prefix_k, prefix_v = (
            split_heads(layer(prefix), self.config.kv_heads)
            for layer in (self.prefix_key, self.prefix_value)
        )
        return ops.prefix_linear_attention(q, k, v, prefix_k, prefix_v, **self.options, **options)
