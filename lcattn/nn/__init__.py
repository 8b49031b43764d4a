"""Token mixers: projections around an op, with a streaming state (Flax NNX)."""

from lcattn.nn.gated_delta_net import DeltaNetConfig, GatedDeltaNet, GatedDeltaNetConfig
from lcattn.nn.gated_linear_attention import (
    GatedLinearAttention,
    GatedLinearAttentionConfig,
    RetentionConfig,
)
from lcattn.nn.layers import SwiGLU
from lcattn.nn.linear_attention import LinearAttention, LinearAttentionConfig
from lcattn.nn.mixer import HeadsConfig, Mixer, MixerConfig
from lcattn.nn.prefix_linear_attention import (
    PrefixLinearAttention,
    PrefixLinearAttentionConfig,
    PrefixLinearAttentionState,
)
from lcattn.nn.recurrent import RecurrentState
from lcattn.nn.short_convolution import (
    ConvolutionState,
    ShortConvolution,
    ShortConvolutionConfig,
)
from lcattn.nn.softmax_attention import KeyValueCache, SoftmaxAttention, SoftmaxAttentionConfig

__all__ = [
    "ConvolutionState",
    "DeltaNetConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "HeadsConfig",
    "KeyValueCache",
    "LinearAttention",
    "LinearAttentionConfig",
    "Mixer",
    "MixerConfig",
    "PrefixLinearAttention",
    "PrefixLinearAttentionConfig",
    "PrefixLinearAttentionState",
    "RecurrentState",
    "RetentionConfig",
    "ShortConvolution",
    "ShortConvolutionConfig",
    "SoftmaxAttention",
    "SoftmaxAttentionConfig",
    "SwiGLU",
]
