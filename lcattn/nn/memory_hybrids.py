"""Titans' hybrids of attention and neural memory that run side by side (MAG) or in turn (MAL)."""

import dataclasses
from typing import Any, no_type_check, override

import jax
from flax import nnx

from lcattn.nn.layers import rms_norm
from lcattn.nn.mixer import Mixer, MixerConfig, State
from lcattn.nn.neural_memory import NeuralMemoryConfig
from lcattn.nn.persistent_attention import PersistentAttentionConfig
from lcattn.traits import Traits
from lcattn.typing import Hidden, Positions, SegmentIds


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HybridState:
    """What a hybrid remembers.

    Attributes:
      attention: recent keys and values.
      memory: the state of the neural memory.
    """

    attention: State
    memory: State


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(MixerConfig):
    """What configs of hybrids share. Both parts take the width and dtypes of the whole.

    Attributes:
      attention: exact attention over recent and persistent tokens.
      memory: what is older.
    """

    attention: PersistentAttentionConfig = dataclasses.field(
        default_factory=PersistentAttentionConfig
    )
    memory: NeuralMemoryConfig = dataclasses.field(default_factory=NeuralMemoryConfig)

    @override
    def validate(self) -> None:
        super().validate()
        self.attention.inherit(self)
        self.memory.inherit(self)


class HybridMixer[C: HybridConfig](Mixer):
    """Attention and memory, to be put together."""

    op = "neural_memory"
    time = "T·(w + C + P/H)"

    def __init__(self, config: C, rngs: nnx.Rngs):
        """Args: `config`, with its width set; `rngs`, for the parameters."""
        self.config = config
        self.attention = config.attention.inherit(config).make(rngs)
        self.memory = config.memory.inherit(config).make(rngs)
        self.memory_norm = rms_norm(config.require_width(), dtype=config.dtype, rngs=rngs)

    @property
    def traits(self) -> Traits:
        """As the attention: sub-quadratic with a window only."""
        return self.attention.traits

    def init_state(self, batch_size: int, max_length: int, dtype: Any = None) -> State:
        """Nothing seen yet."""
        arguments = (batch_size, max_length, dtype)
        return HybridState(
            self.attention.init_state(*arguments), self.memory.init_state(*arguments)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryAsGateConfig(HybridConfig):
    """Titans MAG (arXiv 2501.00663, 4.2): window attention gates what a neural memory answers."""

    def make(self, rngs: nnx.Rngs) -> "MemoryAsGate":
        """Builds the mixer."""
        return MemoryAsGate(self, rngs)


class MemoryAsGate(HybridMixer[MemoryAsGateConfig]):
    """`y = sigmoid(norm(attention(x))) * norm(memory(x))`, the norms with learned scales.

    The paper says that both outputs are normalised with learned vectors and passed through a
    non-linearity; the sigmoid on the attention's side is our reading. Persistent tokens are seen by
    the attention; what the memory would learn from them is in its learned start.
    """

    @override
    def __init__(self, config: MemoryAsGateConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.attention_norm = rms_norm(config.require_width(), dtype=config.dtype, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences."""
        attended = self.attention(x, segment_ids, positions)
        return self._gate(attended, self.memory(x, segment_ids, positions))

    def extend(self, x: Hidden, state: HybridState) -> tuple[Hidden, HybridState]:
        """Continues each stream."""
        attended, attention = self.attention.extend(x, state.attention)
        recalled, memory = self.memory.extend(x, state.memory)
        return self._gate(attended, recalled), HybridState(attention, memory)

    def _gate(self, attended: Hidden, recalled: Hidden) -> Hidden:
        return jax.nn.sigmoid(self.attention_norm(attended)) * self.memory_norm(recalled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryAsLayerConfig(HybridConfig):
    """Titans MAL (arXiv 2501.00663, 4.3): a neural memory, then window attention to its answers."""

    def make(self, rngs: nnx.Rngs) -> "MemoryAsLayer":
        """Builds the mixer."""
        return MemoryAsLayer(self, rngs)


class MemoryAsLayer(HybridMixer[MemoryAsLayerConfig]):
    """`y = attention(norm(memory(x)))`: the memory summarises the past for the attention.

    The norm between them is ours; without it the attention starts on inputs of almost nothing.
    """

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences."""
        recalled = self.memory_norm(self.memory(x, segment_ids, positions))
        return self.attention(recalled, segment_ids, positions)

    def extend(self, x: Hidden, state: HybridState) -> tuple[Hidden, HybridState]:
        """Continues each stream."""
        recalled, memory = self.memory.extend(x, state.memory)
        y, attention = self.attention.extend(self.memory_norm(recalled), state.attention)
        return y, HybridState(attention, memory)
