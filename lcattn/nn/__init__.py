"""Token mixers: projections around an op, with a streaming state (Flax NNX)."""

from lcattn.nn.attention import AttentionConfig, AttentionMixer, CachedAttention, KeyValueCache
from lcattn.nn.core_context_attention import CoreContextAttention, CoreContextAttentionConfig
from lcattn.nn.layers import SwiGLU
from lcattn.nn.linear_attention import LinearAttention, LinearAttentionConfig
from lcattn.nn.mixer import HeadsConfig, Mixer, MixerConfig
from lcattn.nn.selective_attention import SelectiveAttention, SelectiveAttentionConfig
from lcattn.nn.short_convolution import (
    ConvolutionState,
    ShortConvolution,
    ShortConvolutionConfig,
)
from lcattn.nn.softmax_attention import SoftmaxAttention, SoftmaxAttentionConfig
from lcattn.nn.softplus_attention import SoftplusAttention, SoftplusAttentionConfig

__all__ = [
    "AttentionConfig",
    "AttentionMixer",
    "CachedAttention",
    "ConvolutionState",
    "CoreContextAttention",
    "CoreContextAttentionConfig",
    "HeadsConfig",
    "KeyValueCache",
    "LinearAttention",
    "LinearAttentionConfig",
    "Mixer",
    "MixerConfig",
    "SelectiveAttention",
    "SelectiveAttentionConfig",
    "ShortConvolution",
    "ShortConvolutionConfig",
    "SoftmaxAttention",
    "SoftmaxAttentionConfig",
    "SoftplusAttention",
    "SoftplusAttentionConfig",
    "SwiGLU",
]
