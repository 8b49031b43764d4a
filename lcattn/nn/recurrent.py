"""What mixers with a forgetting state share: projections, convolution, gated output, streaming."""

import abc
import dataclasses
from typing import Any, ClassVar, no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.heads import HeadsConfig, HeadsMixer
from lcattn.nn.layers import convolution_taps, merge_heads, projection, rms_norm
from lcattn.nn.mixer import check_hidden, check_stream, default_positions, stream_positions
from lcattn.traits import Traits
from lcattn.typing import Array, Float, Hidden, Int, Positions, SegmentIds


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """What a recurrent mixer remembers; its size does not depend on the length.

    Attributes:
      memory: the state of the recurrence in float32: `[B,K,F,H]`, or what the op calls its state.
      inputs: the last W-1 inputs of the convolution, `[B,W-1,C]`; W = 1 without one.
      length: number of tokens seen, a scalar int32.
    """

    memory: Any
    inputs: Float[Array, "B w C"]
    length: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig(HeadsConfig):
    """What configs of mixers with a forgetting state share.

    Attributes:
      num_kv_heads: heads K of keys, values, gates and states, a divisor of N. None: N.
      feature_dim: size F of queries and keys; a state holds F·H numbers. None: a published share
        of the width, as `head_dim`.
      kernel_size: taps W of a causal depth-wise convolution, with SiLU, over queries, keys and
        values. None: no convolution.
      output_gate: multiply the normalised heads by SiLU(Wg x).
      chunk_size, implementation: passed to the op.
    """

    feature_dim: int | None = None
    kernel_size: int | None = None
    output_gate: bool = True
    chunk_size: int | None = None
    implementation: str | None = None

    # N·F over the width, where feature_dim is None.
    key_share: ClassVar[float] = 1.0

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("feature_dim", "kernel_size", "chunk_size")
        if self.width is not None and self.feature_dim is None:
            self._head_share(self.key_share, "feature_dim")

    @property
    @override
    def key_size(self) -> int:
        """F."""
        return self.feature_dim or self._head_share(self.key_share, "feature_dim")


class RecurrentMixer[C: RecurrentConfig](HeadsMixer[C]):
    """`y = Wo (norm(recurrence(q, k, v, gates of x)) * silu(Wg x))`; q, k, v convolved or not."""

    @override
    def __init__(self, config: C, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        width, F, H = config.require_width(), config.key_size, config.head_size
        N, K = config.num_heads, config.kv_heads
        self.channels = (N + K) * F + K * H if config.kernel_size else 0
        if config.kernel_size:
            self.taps = convolution_taps(
                config, self.channels, config.kernel_size, axis="heads", rngs=rngs
            )
        if config.output_gate:
            self.gate = projection(config, width, N * H, axes=("embed", "heads"), rngs=rngs)
        self.norm = rms_norm(H, dtype=config.dtype, rngs=rngs)

    @property
    def traits(self) -> Traits:
        """Causal, streaming, linear in the length."""
        return Traits(causal=True, streaming=True, subquadratic=True)

    @abc.abstractmethod
    def recur(
        self, x: Hidden, q: Array, k: Array, v: Array, positions: Positions, **options: Any
    ) -> Any:
        """Calls the op on heads of x, with its gates; outputs `[B,T,N,H]` and the final state."""

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences."""
        if positions is None:
            positions = default_positions(x, segment_ids)
        q, k, v, _ = self._heads(x, segment_ids=segment_ids)
        heads, _ = self.recur(x, q, k, v, positions, segment_ids=segment_ids, **self._options)
        return self._gated_out(x, heads)

    @override
    def attention_map(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Float[Array, "B N T T"] | None:
        """What is read of each (convolved) value, before the norm and the output's gate."""
        if positions is None:
            positions = default_positions(x, segment_ids)
        q, k, _, _ = self._heads(x, segment_ids=segment_ids)
        weights, _ = self.recur(
            x, q, k, self.one_hot_values(x), positions, segment_ids=segment_ids, **self._options
        )
        return weights.swapaxes(1, 2)

    def init_state(self, batch_size: int, max_length: int, dtype=None) -> RecurrentState:
        """Nothing read yet; the memory is float32 whatever `dtype`: it sums over all tokens."""
        del max_length
        config = self.config
        inputs = (batch_size, (config.kernel_size or 1) - 1, self.channels)
        return RecurrentState(
            memory=self.init_memory(batch_size),
            inputs=jnp.zeros(inputs, dtype or config.dtype or "float32"),
            length=jnp.zeros((), jnp.int32),
        )

    def init_memory(self, batch_size: int) -> Any:
        """The op's state before the first token."""
        config = self.config
        shape = (batch_size, config.kv_heads, config.key_size, config.head_size)
        return jnp.zeros(shape, jnp.promote_types(config.dtype or "float32", jnp.float32))

    def extend(self, x: Hidden, state: RecurrentState) -> tuple[Hidden, RecurrentState]:
        """Continues each stream."""
        check_stream(x, state.inputs)
        positions = stream_positions(x, state.length)
        q, k, v, inputs = self._heads(x, initial_state=state.inputs)
        heads, memory = self.recur(
            x, q, k, v, positions, initial_state=state.memory, **self._options
        )
        state = RecurrentState(memory, inputs.astype(state.inputs.dtype), state.length + x.shape[1])
        return self._gated_out(x, heads), state

    def _heads(self, x: Array, **options: Any) -> tuple[Array, Array, Array, Any]:
        """Queries, keys and values, and the last inputs of their convolution."""
        config = self.config
        check_hidden(x, config.require_width())
        parts = [self.query(x), self.key(x), self.value(x)]
        inputs = options.get("initial_state")
        if config.kernel_size:
            ends = [parts[0].shape[-1], parts[0].shape[-1] + parts[1].shape[-1]]
            convolved, inputs = ops.short_convolution(
                jnp.concatenate(parts, axis=-1), self.taps[...], return_state=True, **options
            )
            parts = jnp.split(jax.nn.silu(convolved), ends, axis=-1)
        return *self.split(*parts), inputs

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "return_state": True,
            "chunk_size": self.config.chunk_size,
            "implementation": self.config.implementation,
        }

    def _gated_out(self, x: Array, heads: Array) -> Array:
        mixed = merge_heads(self.norm(heads))
        if self.config.output_gate:
            mixed = mixed * jax.nn.silu(self.gate(x))
        return self.out(mixed)
