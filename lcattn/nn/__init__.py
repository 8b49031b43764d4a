"""Token mixers: projections around an op, with a streaming state (Flax NNX)."""

from lcattn.nn.agent_attention import AgentAttention, AgentAttentionConfig, AgentState
from lcattn.nn.attention import AttentionConfig, AttentionMixer, CachedAttention, KeyValueCache
from lcattn.nn.auxiliary import AuxiliaryLoss, auxiliary_loss
from lcattn.nn.core_context_attention import CoreContextAttention, CoreContextAttentionConfig
from lcattn.nn.gated_delta_net import DeltaNetConfig, GatedDeltaNet, GatedDeltaNetConfig
from lcattn.nn.gated_linear_attention import (
    GatedLinearAttention,
    GatedLinearAttentionConfig,
    RetentionConfig,
)
from lcattn.nn.heads import HeadsConfig, HeadsMixer
from lcattn.nn.hyper_attention import HyperAttention, HyperAttentionConfig
from lcattn.nn.layers import SwiGLU
from lcattn.nn.linear_attention import (
    FeatureMapConfig,
    LinearAttention,
    LinearAttentionConfig,
)
from lcattn.nn.memory_as_context import ContextState, MemoryAsContext, MemoryAsContextConfig
from lcattn.nn.memory_hybrids import (
    HybridState,
    MemoryAsGate,
    MemoryAsGateConfig,
    MemoryAsLayer,
    MemoryAsLayerConfig,
)
from lcattn.nn.mixer import Mixer, MixerConfig, TokenMixer
from lcattn.nn.neural_memory import NeuralMemory, NeuralMemoryConfig
from lcattn.nn.ngram_heads import NGramHeads, NGramHeadsConfig, NGramState
from lcattn.nn.persistent_attention import PersistentAttention, PersistentAttentionConfig
from lcattn.nn.prefix_linear_attention import (
    PrefixLinearAttention,
    PrefixLinearAttentionConfig,
    PrefixLinearAttentionState,
)
from lcattn.nn.recurrent import RecurrentConfig, RecurrentState
from lcattn.nn.routing_attention import RoutingAttention, RoutingAttentionConfig, RoutingState
from lcattn.nn.selective_attention import SelectiveAttention, SelectiveAttentionConfig
from lcattn.nn.short_convolution import (
    ConvolutionState,
    ShortConvolution,
    ShortConvolutionConfig,
)
from lcattn.nn.smeared_attention import SmearedAttention, SmearedAttentionConfig, SmearedState
from lcattn.nn.softmax_attention import SoftmaxAttention, SoftmaxAttentionConfig
from lcattn.nn.softplus_attention import SoftplusAttention, SoftplusAttentionConfig

__all__ = [
    "AgentAttention",
    "AgentAttentionConfig",
    "AgentState",
    "AttentionConfig",
    "AttentionMixer",
    "AuxiliaryLoss",
    "CachedAttention",
    "ContextState",
    "ConvolutionState",
    "CoreContextAttention",
    "CoreContextAttentionConfig",
    "DeltaNetConfig",
    "FeatureMapConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "HeadsConfig",
    "HeadsMixer",
    "HybridState",
    "HyperAttention",
    "HyperAttentionConfig",
    "KeyValueCache",
    "LinearAttention",
    "LinearAttentionConfig",
    "MemoryAsContext",
    "MemoryAsContextConfig",
    "MemoryAsGate",
    "MemoryAsGateConfig",
    "MemoryAsLayer",
    "MemoryAsLayerConfig",
    "Mixer",
    "MixerConfig",
    "NGramHeads",
    "NGramHeadsConfig",
    "NGramState",
    "NeuralMemory",
    "NeuralMemoryConfig",
    "PersistentAttention",
    "PersistentAttentionConfig",
    "PrefixLinearAttention",
    "PrefixLinearAttentionConfig",
    "PrefixLinearAttentionState",
    "RecurrentConfig",
    "RecurrentState",
    "RetentionConfig",
    "RoutingAttention",
    "RoutingAttentionConfig",
    "RoutingState",
    "SelectiveAttention",
    "SelectiveAttentionConfig",
    "ShortConvolution",
    "ShortConvolutionConfig",
    "SmearedAttention",
    "SmearedAttentionConfig",
    "SmearedState",
    "SoftmaxAttention",
    "SoftmaxAttentionConfig",
    "SoftplusAttention",
    "SoftplusAttentionConfig",
    "SwiGLU",
    "TokenMixer",
    "auxiliary_loss",
]
