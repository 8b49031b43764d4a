"""Linear attention as a token mixer; with Taylor features, the global layer of BASED."""

import dataclasses
from typing import Any, Literal, override

import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.heads import HeadsConfig, HeadsMixer
from lcattn.nn.layers import rms_norm
from lcattn.nn.mixer import check_stream
from lcattn.ops import LinearAttentionState
from lcattn.ops.linear_attention.features import is_normalized_by_default
from lcattn.traits import Traits
from lcattn.typing import Array, Float, Hidden, Positions, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMapConfig(HeadsConfig):
    """What configs of mixers with feature maps share.

    Attributes:
      feature_dim: size F of queries and keys. Taylor features make F(F+3)/2 + 1 of it, so it is
        the dial between state size and recall; BASED uses 16.
      feature_map: "taylor", "elu" or "identity".
      normalize: divide by the sum of weights. None: yes, except for "identity".
      output_norm: RMSNorm of each output head. None: where `normalize` is off, since outputs then
        grow with the length.
      chunk_size, implementation: passed to the op.
    """

    feature_dim: int = 16
    feature_map: Literal["taylor", "elu", "identity"] = "taylor"
    normalize: bool | None = None
    output_norm: bool | None = None
    chunk_size: int | None = None
    implementation: str | None = None

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("feature_dim", "chunk_size")

    @property
    @override
    def key_size(self) -> int:
        """F."""
        return self.feature_dim


class FeatureMapMixer[C: FeatureMapConfig](HeadsMixer[C]):
    """Heads without position encoding, and a norm on each output head where asked for."""

    @override
    def __init__(self, config: C, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.normalize = config.normalize
        if self.normalize is None:
            self.normalize = is_normalized_by_default(config.feature_map)
        use_norm = not self.normalize if config.output_norm is None else config.output_norm
        self.norm = rms_norm(config.head_size, dtype=config.dtype, rngs=rngs) if use_norm else None

    def zero_sums(self, batch_size: int) -> LinearAttentionState:
        """Zeros, in float32 at least: a sum kept in bfloat16 stops growing."""
        config = self.config
        return ops.linear_attention_state(
            batch_size, config.kv_heads, config.feature_dim,
            config.head_size, feature_map=config.feature_map, normalize=self.normalize,
            dtype=jnp.promote_types(config.dtype or "float32", jnp.float32),
        )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        """What the op is told."""
        config = self.config
        return {
            "feature_map": config.feature_map,
            "normalize": self.normalize,
            "chunk_size": config.chunk_size,
            "implementation": config.implementation,
        }

    @override
    def project_out(self, heads: Array) -> Array:
        """Back to the width, normalised or not."""
        return super().project_out(heads if self.norm is None else self.norm(heads))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(FeatureMapConfig):
    """Linear attention, by default BASED's (arXiv 2402.18668): the past in a state of fixed size.

    All fields are those of `FeatureMapConfig`.
    """

    def make(self, rngs: nnx.Rngs) -> "LinearAttention":
        """Builds the mixer."""
        return LinearAttention(self, rngs)


class LinearAttention(FeatureMapMixer[LinearAttentionConfig]):
    """`y = Wo · linear_attention(Wq x, Wk x, Wv x)`."""

    op = "linear_attention"
    time = "T·(C + F²)"

    @property
    def traits(self) -> Traits:
        """Causal, streaming, linear in the length."""
        return Traits(causal=True, streaming=True, subquadratic=True)

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences; `positions` do not matter."""
        del positions
        return self.project_out(self._attend(*self.project(x), segment_ids=segment_ids))

    @override
    def attention_map(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Float[Array, "B N T T"]:
        """The op's weights; with `normalize`, rows sum to 1."""
        del positions
        q, k, _ = self.project(x)
        weights = self._attend(q, k, self.one_hot_values(x), segment_ids=segment_ids)
        return weights.swapaxes(1, 2)

    def init_state(self, batch_size: int, max_length: int, dtype=None) -> LinearAttentionState:
        """Zeros, in float32 whatever `dtype`."""
        del max_length, dtype
        return self.zero_sums(batch_size)

    def extend(self, x: Hidden, state: LinearAttentionState) -> tuple[Hidden, LinearAttentionState]:
        """Continues each stream."""
        check_stream(x, state.kv)
        out, state = self._attend(*self.project(x), initial_state=state, return_state=True)
        return self.project_out(out), state

    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        return ops.linear_attention(q, k, v, **self.options, **options)
