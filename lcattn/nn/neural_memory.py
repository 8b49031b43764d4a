"""Titans' neural memory as a token mixer (LMM): a network that learns the sequence as it reads."""

import dataclasses
import itertools
from typing import Any, Literal, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.layers import projection, unit_norm
from lcattn.nn.recurrent import RecurrentConfig, RecurrentMixer
from lcattn.ops import NeuralMemoryState
from lcattn.ops.neural_memory.api import DEEPEST, DEFAULT_CHUNK
from lcattn.ops.neural_memory.network import recall
from lcattn.typing import Array, Float, Hidden, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuralMemoryConfig(RecurrentConfig):
    """The neural memory of Titans (arXiv 2501.00663) alone: a network trained by what it reads.

    The defaults keep training finite, whatever the gates learn: see `max_learning_rate`,
    `decay_bias` and `unit_values`. The paper gives no values for any of the fields below.

    Attributes:
      depth: layers of the memory, 1 (a matrix) to 4.
      expansion: inner size of a deeper memory over the head size.
      activation: between its layers.
      momentum: let what follows a surprise be written too.
      decay: let the memory forget.
      max_learning_rate: bound of the learning rate, which is that times (1 - momentum) times a
        sigmoid of the token. None: `1 / (2 * depth * chunk_size)`. Gradients of a chunk add up, so
        this is the largest rate at which a chunk of one and the same key does not overshoot. It
        takes the layers of the start for what they are initialised to, norms of about 2: a memory
        of three or four layers still diverges if training lets them grow far above that, so keep
        them under weight decay.
      decay_bias: added to the logit of the decay. None: -6, or -8 for a deeper memory: decay pulls
        all its layers to zero, from where it cannot learn (at a decay of 0.004 for 4,096 tokens
        nothing is left, at 0.0003 most is).
      unit_values: scale values to norm 1, as queries and keys are (ours). The curvature of a
        deeper memory grows with what it stores.
    """

    kernel_size: int | None = 4
    depth: int = 2
    expansion: int = 2
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    momentum: bool = True
    decay: bool = True
    max_learning_rate: float | None = None
    decay_bias: float | None = None
    unit_values: bool = True

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("expansion", "max_learning_rate")
        if not 1 <= self.depth <= DEEPEST:
            raise self.error("depth", f"1 to {DEEPEST} layers")

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Inputs of each layer of the memory, and the outputs of the last."""
        inner = self.expansion * self.head_size
        return (self.key_size, *(inner,) * (self.depth - 1), self.head_size)

    @property
    def learning_rate(self) -> float:
        """The bound of the learning rate."""
        largest = 1 / (2 * self.depth * (self.chunk_size or DEFAULT_CHUNK))
        return largest if self.max_learning_rate is None else self.max_learning_rate

    def make(self, rngs: nnx.Rngs) -> "NeuralMemory":
        """Builds the mixer."""
        return NeuralMemory(self, rngs)


class NeuralMemory(RecurrentMixer[NeuralMemoryConfig]):
    """`y = Wo (norm(neural_memory(q, k, v, gates of x)) * silu(Wg x))`.

    Queries, keys and values are convolved, passed through SiLU and scaled to norm 1. Gates, in
    float32, with the largest learning rate L and bias d of the config:

        momentum      = sigmoid(We x + be)
        learning_rate = L (1 - momentum) sigmoid(Wt x + bt)
        decay         = sigmoid(Wa x + ba + d)

    The factor 1 - momentum makes of S a mean of gradients instead of a sum, so that a momentum
    close to 1 delays a write and does not magnify it.
    """

    op = "neural_memory"
    time = "T·(C + P/H)"

    @override
    def __init__(self, config: NeuralMemoryConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        width, K = config.require_width(), config.kv_heads
        self.gates = projection(
            config, width, 3 * K, axes=("embed", None), use_bias=True, rngs=rngs
        )
        dtype = jnp.dtype(config.param_dtype or "float32")
        glorot = nnx.initializers.glorot_normal(batch_axis=0)
        sizes = itertools.pairwise(config.layer_sizes)
        self.start = nnx.List(
            nnx.Param(glorot(rngs.params(), (K, inputs, outputs), dtype), axes=(None, None, None))
            for inputs, outputs in sizes
        )

    @override
    def init_memory(self, batch_size: int) -> NeuralMemoryState:
        return ops.neural_memory_state(self._start, batch_size)

    @override
    def recur(self, x: Hidden, q: Array, k: Array, v: Array, positions: Any, **options: Any) -> Any:
        del positions
        q, k = unit_norm(q), unit_norm(k)
        if self.config.unit_values:
            v = unit_norm(v)
        rate, momentum, decay = self._gates(x)
        return ops.neural_memory(
            q, k, v, rate, momentum, decay, self._start,
            # Answers of norm 1 get entries of about 1, which the norm after it is made for.
            scale=self.config.head_size**0.5, activation=self.config.activation, **options,
        )  # fmt: skip

    @override
    def attention_map(self, x: Hidden, segment_ids: Any = None, positions: Any = None) -> None:
        """None: the answers of a network are not sums of the values it was trained on."""

    def continue_from(
        self, x: Hidden, memory: NeuralMemoryState, segment_ids: SegmentIds | None = None
    ) -> tuple[Hidden, NeuralMemoryState]:
        """`extend` for packed rows of a mixer without convolution; documents may end in them."""
        q, k, v, _ = self._heads(x)
        heads, memory = self.recur(
            x, q, k, v, None, segment_ids=segment_ids, initial_state=memory, **self._options
        )
        return self._gated_out(x, heads), memory

    def recall(
        self, q: Float[Array, "B T N F"], weights: tuple[Array, ...]
    ) -> Float[Array, "B T N H"]:
        """Answers of a memory `[B,K,in,out]` that is left as it is."""
        group = self.config.num_heads // self.config.kv_heads
        weights = tuple(jnp.repeat(layer, group, axis=1) for layer in weights)
        answers = recall(unit_norm(q).swapaxes(1, 2), weights, self.config.activation)
        return self.config.head_size**0.5 * answers.swapaxes(1, 2).astype(q.dtype)

    @property
    def _start(self) -> tuple[Array, ...]:
        """The network of each head before the first token, float32."""
        return tuple(layer[...].astype(jnp.float32) for layer in self.start)

    def _gates(self, x: Hidden) -> list[Float[Array, "B T K"]]:
        """Learning rate, momentum and decay."""
        config = self.config
        dtype = jnp.promote_types(config.dtype or "float32", jnp.float32)
        rate, momentum, decay = jnp.split(self.gates(x).astype(dtype), 3, axis=-1)
        momentum = jax.nn.sigmoid(momentum) if config.momentum else jnp.zeros_like(momentum)
        rate = config.learning_rate * (1 - momentum) * jax.nn.sigmoid(rate)
        bias = config.decay_bias
        if bias is None:
            bias = -6.0 if config.depth == 1 else -8.0
        decay = jax.nn.sigmoid(decay + bias) if config.decay else jnp.zeros_like(decay)
        return [rate, momentum, decay]
