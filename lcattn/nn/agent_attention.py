"""Agent attention as a token mixer: causal with learned agents, or as published for images."""

import dataclasses
from typing import Any, Literal, no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcattn import ops
from lcattn.errors import argument_error
from lcattn.nn.heads import HeadsConfig, HeadsMixer
from lcattn.nn.layers import convolution_taps, merge_heads, split_heads
from lcattn.nn.mixer import check_stream
from lcattn.ops import AgentAttentionState
from lcattn.traits import Traits
from lcattn.typing import Array, Float, Hidden, Positions, SegmentIds


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AgentState:
    """What a stream of agent attention remembers; its size does not depend on the length.

    Attributes:
      agents: what the agents have read.
      values: the last W-1 inputs of the convolution, `[B,W-1,K·H]`; W = 1 without one.
    """

    agents: AgentAttentionState
    values: Float[Array, "B w C"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentAttentionConfig(HeadsConfig):
    """Agent attention (arXiv 2312.08874): a few agents read the tokens, and tokens the agents.

    Attributes:
      num_agents: n, the dial between state size and recall. On a grid, agents of one axis times
        those of the other (published: 49 = 7 x 7).
      agents: "learned" parameters, or "pooled" from the queries (published; they know the whole
        sequence, so not causal).
      causal: tokens read of the past only, and the mixer streams (ours). Otherwise as published.
      grid: height and width of an image whose rows the tokens are. None: a line.
      kernel_size: taps a side of a depth-wise convolution over the values, added to the output (3
        as published): causal over the last tokens, or centred, on the grid if there is one. It
        restores the rank that n agents lack. None: no convolution.
      bias_size: side of the coarse maps of which the agents' positional biases are made, together
        with a term for each row and each column (published: 7). Needs a `grid`. None: no biases.
      agent_std: standard deviation of learned agents at first.
      chunk_size, implementation: passed to `lcattn.ops.agent_attention`.
    """

    num_agents: int = 16
    agents: Literal["learned", "pooled"] = "learned"
    causal: bool = True
    grid: tuple[int, int] | None = None
    kernel_size: int | None = 3
    bias_size: int | None = None
    agent_std: float = 0.02
    chunk_size: int | None = None
    implementation: str | None = None

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("num_agents", "kernel_size", "bias_size", "agent_std", "chunk_size")
        if self.causal and self.agents == "pooled":
            raise self.error("agents", "'learned' where causal: pooled agents know the future")
        if self.causal and self.grid is not None:
            raise self.error("grid", "None where causal")
        if self.grid is not None and min(self.grid) < 1:
            raise self.error("grid", "a height and a width of at least 1")
        if self.bias_size is not None and self.grid is None:
            raise self.error("bias_size", "None without a grid")
        if not self.causal and self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise self.error("kernel_size", "an odd number where not causal")
        if self.agents == "pooled" and self.grid is not None:
            self.agent_grid  # noqa: B018 raises where there is none

    @property
    def agent_grid(self) -> tuple[int, ...]:
        """Pooled agents along each axis: a square on a grid."""
        if self.grid is None:
            return (self.num_agents,)
        side = round(self.num_agents**0.5)
        if side**2 != self.num_agents or side > min(self.grid):
            raise self.error("num_agents", f"a square no larger than the grid {self.grid}")
        return (side, side)

    def make(self, rngs: nnx.Rngs) -> "AgentAttention":
        """Builds the mixer."""
        return AgentAttention(self, rngs)


class AgentAttention(HeadsMixer[AgentAttentionConfig]):
    """`y = Wo (agent_attention(Wq x, Wk x, Wv x, agents) + convolution(Wv x))`, without biases."""

    op = "agent_attention"
    time = "T·n"

    @override
    def __init__(self, config: AgentAttentionConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        N, K, H = config.num_heads, config.kv_heads, config.head_size
        dtype = jnp.dtype(config.param_dtype or "float32")
        if config.agents == "learned":
            shape = (config.num_agents, N, H)
            values = config.agent_std * jax.random.normal(rngs.params(), shape, dtype)
            self.agents = nnx.Param(values, axes=(None, None, None))
        if config.kernel_size is not None:
            taps = config.kernel_size * (1 if config.grid is None else config.kernel_size)
            self.taps = convolution_taps(config, K * H, taps, axis="heads", rngs=rngs)
            self.tap_bias = nnx.Param(jnp.zeros((K * H,), dtype), axes=("heads",))
        if config.bias_size is not None:
            self.key_bias = GridBias(config, rngs)
            self.query_bias = GridBias(config, rngs)

    @property
    def traits(self) -> Traits:
        """Linear in the length; causal and streaming as configured."""
        causal = self.config.causal
        return Traits(causal=causal, streaming=causal, subquadratic=True)

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences; `positions` do not matter.

        Raises:
          ValueError: for `segment_ids` where something looks across documents: pooled agents, a
            centred convolution, positional biases.
        """
        del positions
        config = self.config
        crosses = config.agents == "pooled" or config.kernel_size or config.bias_size
        if segment_ids is not None and not config.causal and crosses:
            expected = "None with pooled agents, a centred convolution or biases"
            raise argument_error("segment_ids", expected, f"shape {segment_ids.shape}")
        if config.grid is not None and config.grid[0] * config.grid[1] != x.shape[1]:
            raise argument_error("x", f"T tokens of the grid {config.grid}", f"shape {x.shape}")
        biases = {}
        if config.bias_size is not None:
            biases = {"key_bias": self.key_bias(), "query_bias": self.query_bias().mT}
        q, k, v = self.project(x)
        heads = self._attend(q, k, v, causal=config.causal, segment_ids=segment_ids, **biases)
        if config.kernel_size is not None:
            heads += self._local(self._convolve(v, segment_ids))
        return self.project_out(heads)

    def init_state(self, batch_size: int, max_length: int, dtype=None) -> AgentState:
        """Nothing read yet; what agents hold is float32 whatever `dtype`.

        Raises:
          ValueError: if the mixer is not causal, and so does not stream.
        """
        del max_length
        config = self.config
        self._require_causal()
        compute = config.dtype or "float32"
        inputs = (batch_size, (config.kernel_size or 1) - 1, config.kv_heads * config.head_size)
        return AgentState(
            agents=ops.agent_attention_state(
                batch_size, config.num_heads, config.num_agents, config.head_size,
                dtype=jnp.promote_types(compute, jnp.float32),
            ),
            values=jnp.zeros(inputs, dtype or compute),
        )  # fmt: skip

    def extend(self, x: Hidden, state: AgentState) -> tuple[Hidden, AgentState]:
        """Continues each stream."""
        self._require_causal()
        check_stream(x, state.values)
        q, k, v = self.project(x)
        heads, agents = self._attend(q, k, v, initial_state=state.agents, return_state=True)
        values = state.values
        if self.config.kernel_size is not None:
            convolved, values = ops.short_convolution(
                merge_heads(v), self.taps[...], initial_state=values, return_state=True
            )
            heads += self._local(convolved)
        state = AgentState(agents, values.astype(state.values.dtype))
        return self.project_out(heads), state

    def _require_causal(self) -> None:
        if not self.config.causal:
            raise self.config.error("causal", "True to stream")

    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        config = self.config
        if config.agents == "learned":
            agents = self.agents[...].astype(q.dtype)
        else:
            agents = ops.pooled_agents(q, config.agent_grid, grid=config.grid)
        return ops.agent_attention(
            q, k, v, agents,
            chunk_size=config.chunk_size, implementation=config.implementation, **options,
        )  # fmt: skip

    def _convolve(self, v: Array, segment_ids: SegmentIds | None) -> Any:
        """`[B,T,K·H]`: over the last tokens, or over the neighbours on a grid or line."""
        config, values = self.config, merge_heads(v)
        if config.causal:
            return ops.short_convolution(values, self.taps[...], segment_ids=segment_ids)
        height, width = config.grid or (1, values.shape[1])
        rows = 1 if config.grid is None else config.kernel_size
        taps = self.taps[...].astype(values.dtype).T.reshape(rows, config.kernel_size, 1, -1)
        return lax.conv_general_dilated(
            values.reshape(len(values), height, width, -1), taps, (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=values.shape[-1],
        ).reshape(values.shape)  # fmt: skip

    def _local(self, convolved: Array) -> Float[Array, "B T N H"]:
        """What the convolution adds to each query head."""
        config = self.config
        values = convolved + self.tap_bias[...].astype(convolved.dtype)
        heads = split_heads(values, config.kv_heads)
        return jnp.repeat(heads, config.num_heads // config.kv_heads, axis=2)


class GridBias(nnx.Module):
    """A positional bias of each head, agent and token of a grid.

    The published one: a coarse map, resized bilinearly, plus a term for each row and each column.
    """

    def __init__(self, config: AgentAttentionConfig, rngs: nnx.Rngs):
        """Args: `config`, with a grid; `rngs`, for the parameters."""
        assert config.grid is not None
        assert config.bias_size is not None
        self.grid = config.grid
        height, width = config.grid
        heads = (config.num_heads, config.num_agents)
        dtype = jnp.dtype(config.param_dtype or "float32")

        def normal(*shape: int) -> nnx.Param:
            values = 0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, heads + shape, dtype)
            return nnx.Param(values, axes=(None,) * values.ndim)

        self.coarse = normal(config.bias_size, config.bias_size)
        self.rows, self.columns = normal(height, 1), normal(1, width)

    def __call__(self) -> Float[Array, "N n T"]:
        """The biases of all tokens, row by row."""
        coarse = self.coarse[...]
        fine = jax.image.resize(coarse, (*coarse.shape[:2], *self.grid), "bilinear")
        bias = fine + self.rows[...] + self.columns[...]
        return bias.reshape(*bias.shape[:2], -1)
