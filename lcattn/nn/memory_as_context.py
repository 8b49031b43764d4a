"""Titans' memory as context (MAC): attention over segments that begin with what memory recalls."""

import dataclasses
from typing import Any, NamedTuple, no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcattn.nn.layers import merge_heads, projection, rms_norm, split_heads
from lcattn.nn.memory_hybrids import HybridConfig, HybridMixer
from lcattn.nn.mixer import check_stream, default_positions, stream_positions
from lcattn.nn.neural_memory import NeuralMemoryConfig
from lcattn.nn.persistent_attention import PersistentAttentionConfig
from lcattn.ops import NeuralMemoryState
from lcattn.ops.chunks import cut, paste
from lcattn.ops.neural_memory.state import select
from lcattn.ops.neural_memory.windows import Windows, lay_out
from lcattn.traits import Traits
from lcattn.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class Segment(NamedTuple):
    """Keys and values of one segment, `[B,C,K,H]`: of its tokens, and of what they recall."""

    k: Float[Array, "B C K H"]
    v: Float[Array, "B C K H"]
    recalled_k: Float[Array, "B C K H"]
    recalled_v: Float[Array, "B C K H"]


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContextState:
    """What a stream of MAC remembers; its size does not depend on the length.

    Attributes:
      memory: the memory after the last token.
      source: its weights before the segment under way, which this recalls from.
      segment: keys and values of the segment under way.
      length: number of tokens seen, a scalar int32.
    """

    memory: NeuralMemoryState
    source: tuple[Array, ...]
    segment: Segment
    length: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryAsContextConfig(HybridConfig):
    """Titans MAC (arXiv 2501.00663, 4.1): segments attend to what a neural memory recalls for them.

    Attributes:
      segment_size: tokens C that attend to each other, and to what the memory of the segments
        before recalls for them.
      attention: of the tokens of a segment; its window must be None.
      memory: must have no convolution (the attention has mixed neighbours already).
    """

    segment_size: int = 256
    attention: PersistentAttentionConfig = dataclasses.field(
        default_factory=lambda: PersistentAttentionConfig(window=None)
    )
    memory: NeuralMemoryConfig = dataclasses.field(
        default_factory=lambda: NeuralMemoryConfig(kernel_size=None)
    )

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("segment_size")
        if self.attention.window is not None:
            raise self.error("attention", "a PersistentAttentionConfig with window=None")
        if self.memory.kernel_size is not None:
            raise self.error("memory", "a NeuralMemoryConfig with kernel_size=None")

    def make(self, rngs: nnx.Rngs) -> "MemoryAsContext":
        """Builds the mixer."""
        return MemoryAsContext(self, rngs)


class MemoryAsContext(HybridMixer[MemoryAsContextConfig]):
    """Segment by segment, with P persistent tokens and the memory M as the last segment left it:

        h = norm(W recall(M, Wh x))
        a = attention(x, over P, h and x, causally)
        y = sigmoid(norm(a)) * norm(memory(a)), which trains M on

    Read literally, the paper lets every token see all of h, and reads y from the memory after the
    whole segment: both tell a token of those after it. Here token i sees h_j for j <= i, and reads
    the memory as it is after its own write.
    """

    @override
    def __init__(self, config: MemoryAsContextConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        width, memory = config.require_width(), self.memory.config
        queries, answers = (memory.num_heads * size for size in (memory.key_size, memory.head_size))
        self.context_query = projection(config, width, queries, axes=("embed", "heads"), rngs=rngs)
        self.context_out = projection(config, answers, width, axes=("heads", "embed"), rngs=rngs)
        self.context_norm = rms_norm(width, dtype=config.dtype, rngs=rngs)
        self.attention_norm = rms_norm(width, dtype=config.dtype, rngs=rngs)

    @property
    @override
    def traits(self) -> Traits:
        """Causal, streaming, linear in the length."""
        return Traits(causal=True, streaming=True, subquadratic=True)

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences."""
        if positions is None:
            positions = default_positions(x, segment_ids)
        windows = lay_out(segment_ids, None, x.shape, self.config.segment_size)
        ids = None if segment_ids is None else _by_window(windows, segment_ids, empty=-1)
        fresh = self.memory.init_memory(x.shape[0])

        @jax.checkpoint
        def step(memory, window):
            return lax.cond(jnp.any(window[-1]), advance, self._skip, memory, window)

        def advance(memory, window):
            x, positions, ids, starts_document, _ = window
            memory = select(starts_document, fresh, memory)
            y, memory, _ = self._advance(x, positions, memory, memory.weights, segment_ids=ids)
            return memory, y

        window = (
            _by_window(windows, x), _by_window(windows, positions), ids,
            windows.starts_document, windows.used,
        )  # fmt: skip
        _, y = lax.scan(step, fresh, window)
        return windows.scatter(paste(y, windows.tokens.shape[1]))

    @override
    def init_state(self, batch_size: int, max_length: int, dtype: Any = None) -> ContextState:
        """Nothing seen yet; the memory is float32 whatever `dtype`."""
        del max_length
        attention, memory = self.attention.config, self.memory.init_memory(batch_size)
        shape = (batch_size, self.config.segment_size, attention.kv_heads, attention.head_size)
        empty = jnp.zeros(shape, dtype or self.config.dtype or "float32")
        return ContextState(
            memory=memory,
            source=memory.weights,
            segment=Segment(empty, empty, empty, empty),
            length=jnp.zeros((), jnp.int32),
        )

    def extend(self, x: Hidden, state: ContextState) -> tuple[Hidden, ContextState]:
        """Continues each stream."""
        check_stream(x, state.segment.k)
        offset = state.length % self.config.segment_size
        under_way = jnp.broadcast_to(offset, x.shape[:1])
        windows = lay_out(None, under_way, x.shape, self.config.segment_size)
        one_document = jnp.zeros(x.shape[:2], jnp.int32)

        def step(carry, window):
            return lax.cond(jnp.any(window[-1]), advance, self._skip, carry, window)

        def advance(carry, window):
            memory, source, segment, offset = carry
            x, positions, ids, starts_segment, used = window
            source = select(starts_segment, memory.weights, source)
            y, memory, segment = self._advance(
                x, positions, memory, source, memory_ids=ids, past=segment, offset=offset
            )
            offset = (offset + jnp.sum(used[0])) % self.config.segment_size
            return (memory, source, segment, offset.astype(jnp.int32)), y

        window = (
            _by_window(windows, x),
            _by_window(windows, stream_positions(x, state.length)),
            _by_window(windows, one_document, empty=-1),
            windows.starts_chunk,
            windows.used,
        )
        carry, y = lax.scan(step, (state.memory, state.source, state.segment, offset), window)
        memory, source, segment, _ = carry
        y = windows.scatter(paste(y, windows.tokens.shape[1]))
        return y, ContextState(memory, source, segment, state.length + x.shape[1])

    def _advance(
        self,
        x: Hidden,
        positions: Positions,
        memory: NeuralMemoryState,
        source: tuple[Array, ...],
        *,
        segment_ids: SegmentIds | None = None,
        memory_ids: SegmentIds | None = None,
        past: Segment | None = None,
        offset: Int[Array, ""] | int = 0,
    ) -> tuple[Hidden, NeuralMemoryState, Segment]:
        """Tokens of one segment, after `offset` others of it in `past`."""
        recalled = self.memory.recall(
            split_heads(self.context_query(x), self.memory.config.num_heads), source
        )
        context = self.context_norm(self.context_out(merge_heads(recalled)))
        q, k, v = self.attention._heads(x, positions, positions + 1)
        _, recalled_k, recalled_v = self.attention._heads(context, positions, positions + 1)
        segment = Segment(k, v, recalled_k, recalled_v)
        options: dict[str, Any] = {"segment_ids": segment_ids}
        if past is not None:
            size, options = past.k.shape[1], {"query_position": offset}
            # Slots behind the segment take the empty ones of a window that ends with it.
            longer = jax.tree.map(lambda old, new: _place(old, new, offset), past, segment)
            past = jax.tree.map(lambda x: x[:, :size], longer)
            segment = jax.tree.map(lambda x: x.astype(q.dtype), longer)
        attended = self.attention.project_out(
            self.attention.attend_to(q, segment[:2], segment[2:], **options)
        )
        ids = segment_ids if memory_ids is None else memory_ids
        answered, memory = self.memory.continue_from(attended, memory, ids)
        y = jax.nn.sigmoid(self.attention_norm(attended)) * self.memory_norm(answered)
        return y, memory, past or segment

    def _skip(self, carry: Any, window: Any) -> Any:
        """A window without tokens."""
        return carry, jnp.zeros_like(window[0], dtype=self.config.dtype or "float32")


def _by_window(windows: Windows, x: Array, *, empty: int = 0) -> Array:
    """`[B,T]` or `[B,T,D]` by window `[n,B,C]` or `[n,B,C,D]`, with a value for empty slots."""
    size, gathered = windows.used.shape[-1], windows.gather(x)
    if x.ndim == 2:
        return jnp.where(windows.used, cut(gathered[..., None], size)[..., 0], empty)
    return cut(gathered, size)


def _place(old: Array, new: Array, offset: Array | int) -> Array:
    """The old keys or values, with room for and with the new ones from `offset` on."""
    longer = jnp.pad(old, ((0, 0), (0, new.shape[1]), (0, 0), (0, 0)))
    return lax.dynamic_update_slice_in_dim(longer, new.astype(old.dtype), offset, axis=1)
