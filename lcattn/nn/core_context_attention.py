"""Core context aware attention as a token mixer (CCA)."""

import dataclasses
from typing import Any, override

from flax import nnx

from lcattn import ops
from lcattn.nn.attention import AttentionConfig, AttentionMixer
from lcattn.nn.mixer import check_stream, stream_positions
from lcattn.ops import CoreContextState
from lcattn.traits import Traits
from lcattn.typing import Array, Hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreContextAttentionConfig(AttentionConfig):
    """Core context attention, CCA (arXiv 2412.12465): recent tokens one by one, far ones in groups.

    Attributes:
      group_size: tokens a group; 16 as published.
      window: tokens between a query and the newest group it sees; 1024 as published. Both may be
        changed without training again.
      share_cores: one core for all query heads of a key head (ours), which keeps what grouped
        queries save.
    """

    group_size: int = 16
    window: int = 1024
    share_cores: bool = False

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("group_size", "window")

    def make(self, rngs: nnx.Rngs) -> "CoreContextAttention":
        """Builds the mixer."""
        return CoreContextAttention(self, rngs)


class CoreContextAttention(AttentionMixer[CoreContextAttentionConfig]):
    """`y = Wo · core_context_attention(rotate(Wq x), rotate(Wk x), Wv x)`, without biases.

    The parameters are those of `SoftmaxAttention`, whose checkpoints it can take.
    """

    op = "core_context_attention"
    time = "T·(T/g + w)"

    @property
    def traits(self) -> Traits:
        """Time is T² over the group size, memory linear."""
        return Traits(causal=True, streaming=True, subquadratic=False)

    def init_state(self, batch_size: int, max_length: int, dtype=None) -> CoreContextState:
        """No tokens and no groups yet, with room for those of `max_length` tokens."""
        config = self.config
        return ops.core_context_attention_state(
            batch_size, max_length, config.num_heads, config.kv_heads, config.head_size,
            config.head_size, group_size=config.group_size, window=config.window,
            share_cores=config.share_cores, dtype=dtype or config.dtype or "float32",
        )  # fmt: skip

    def extend(self, x: Hidden, state: CoreContextState) -> tuple[Hidden, CoreContextState]:
        """Continues each stream.

        Raises:
          ValueError: if the state holds another number of streams, or (outside `jit`) if the tokens
            do not fit into it. Under `jit`, which cannot raise, outputs past the end are NaN.
        """
        check_stream(x, state.k)
        positions = stream_positions(x, state.length)
        q, k, v = self._heads(x, positions, positions + 1)
        out, state = self._attend(q, k, v, initial_state=state, return_state=True)
        return self.project_out(out), state

    @override
    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        config = self.config
        return ops.core_context_attention(
            q, k, v,
            group_size=config.group_size, window=config.window, share_cores=config.share_cores,
            implementation=config.implementation, **options,
        )  # fmt: skip
