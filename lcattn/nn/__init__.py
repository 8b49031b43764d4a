"""Token mixers: projections around an op, with a streaming state (Flax NNX)."""

from lcattn.nn.layers import SwiGLU
from lcattn.nn.linear_attention import LinearAttention, LinearAttentionConfig
from lcattn.nn.mixer import HeadsConfig, Mixer, MixerConfig
from lcattn.nn.short_convolution import (
    ConvolutionState,
    ShortConvolution,
    ShortConvolutionConfig,
)
from lcattn.nn.softmax_attention import KeyValueCache, SoftmaxAttention, SoftmaxAttentionConfig

__all__ = [
    "ConvolutionState",
    "HeadsConfig",
    "KeyValueCache",
    "LinearAttention",
    "LinearAttentionConfig",
    "Mixer",
    "MixerConfig",
    "ShortConvolution",
    "ShortConvolutionConfig",
    "SoftmaxAttention",
    "SoftmaxAttentionConfig",
    "SwiGLU",
]
