"""The library's own mixers as cases of the suite."""

import dataclasses

from lcattn import nn
from lcattn.testing.conformance.cases import MixerCase


def _softmax_mixer(name: str, **fields) -> MixerCase:
    config = nn.SoftmaxAttentionConfig(width=16, num_heads=4, **fields)
    return MixerCase(name=f"SoftmaxAttention[{name}]", config=config)


def _linear_mixer(name: str, **fields) -> MixerCase:
    config = nn.LinearAttentionConfig(width=16, num_heads=4, feature_dim=4, **fields)
    return MixerCase(name=f"LinearAttention[{name}]", config=config)


def _convolution_mixer(taps: int) -> MixerCase:
    config = nn.ShortConvolutionConfig(width=16, kernel_size=taps)
    return MixerCase(name=f"ShortConvolution[taps={taps}]", config=config, chunk=max(2, taps))


def _agent_mixer(name: str, **fields) -> MixerCase:
    config = nn.AgentAttentionConfig(width=16, num_heads=4, num_agents=3, agent_std=1.0, **fields)
    return MixerCase(name=f"AgentAttention[{name}]", config=config)


def _core_context_mixer(name: str, **fields) -> MixerCase:
    config = nn.CoreContextAttentionConfig(width=16, num_heads=4, group_size=3, window=5, **fields)
    return MixerCase(name=f"CoreContextAttention[{name}]", config=config)


def _routing_mixer(name: str, **fields) -> MixerCase:
    config = nn.RoutingAttentionConfig(
        width=16, num_heads=4, num_clusters=3, cluster_size=4, window=5, **fields
    )
    return MixerCase(name=f"RoutingAttention[{name}]", config=config)


def _hyper_mixer(name: str, **fields) -> MixerCase:
    config = nn.HyperAttentionConfig(
        width=16, num_heads=4, num_projections=3, block_size=4, sample_size=3, min_seq_len=8,
        **fields,
    )  # fmt: skip
    return MixerCase(name=f"HyperAttention[{name}]", config=config)


def _selective_mixer(name: str, **fields) -> MixerCase:
    config = nn.SelectiveAttentionConfig(
        width=16, num_heads=4, gate_init="xavier", position_init=0.3, **fields
    )
    return MixerCase(name=f"SelectiveAttention[{name}]", config=config)


def _softplus_mixer(name: str, **fields) -> MixerCase:
    config = nn.SoftplusAttentionConfig(width=16, num_heads=4, **fields)
    return MixerCase(
        name=f"SoftplusAttention[{name}]", config=config,
        tolerance=1e-4, low_precision_tolerance=1e-1,
    )  # fmt: skip


def _gated_mixer(name: str, kind=nn.GatedLinearAttentionConfig, **fields) -> MixerCase:
    config = kind(width=16, num_heads=4, chunk_size=8, **fields)
    return MixerCase(name=f"GatedLinearAttention[{name}]", config=config)


def _delta_mixer(name: str, kind=nn.GatedDeltaNetConfig, **fields) -> MixerCase:
    config = kind(width=16, num_heads=4, chunk_size=8, **fields)
    # A write depends on all before it, so roundings of keys and strengths add up: over 12 draws of
    # parameters bfloat16 came within 0.014 to 0.051 of float32 (gated linear attention: 0.015).
    return MixerCase(name=f"GatedDeltaNet[{name}]", config=config, low_precision_tolerance=6e-2)


def _variant(case: MixerCase) -> MixerCase:
    return dataclasses.replace(case, is_variant=True)


def _memory_mixer(name: str, **fields) -> MixerCase:
    config = nn.NeuralMemoryConfig(width=16, num_heads=4, chunk_size=8, **fields)
    return MixerCase(name=f"NeuralMemory[{name}]", config=config)


def _hybrid_mixer(kind, attention=None, memory=None, **fields) -> MixerCase:
    config = kind(
        width=16,
        attention=nn.PersistentAttentionConfig(num_heads=4, num_persistent=3, **attention or {}),
        memory=nn.NeuralMemoryConfig(num_heads=2, chunk_size=3, **memory or {}),
        **fields,
    )
    # In MAC a softmax reads what a memory recalls that a softmax wrote: over 10 draws of parameters
    # bfloat16 came within 0.014 to 0.037 of float32 (the memory alone: 0.008 to 0.019).
    loose = 5e-2 if kind is nn.MemoryAsContextConfig else 2e-2
    name = kind.__name__.removesuffix("Config")
    return MixerCase(name=name, config=config, low_precision_tolerance=loose)


MIXERS: tuple[MixerCase, ...] = (
    _softmax_mixer("rope"),
    _variant(
        _softmax_mixer("grouped,qk_norm,rope_size=2", num_kv_heads=2, qk_norm=True, rope_size=2)
    ),
    _variant(_softmax_mixer("alibi", position_encoding="alibi")),
    _softmax_mixer("window=8", window=8),
    _variant(
        _softmax_mixer(
            "window=8,alibi,grouped", window=8, position_encoding="alibi", num_kv_heads=1
        )
    ),
    _variant(_softmax_mixer("window=1,nope", window=1, position_encoding="nope")),
    _variant(_linear_mixer("taylor")),
    _linear_mixer("taylor,chunk=8,grouped", chunk_size=8, num_kv_heads=2),
    _variant(_linear_mixer("identity,norm", feature_map="identity", chunk_size=8)),
    _gated_mixer("channel,grouped", num_kv_heads=2),
    _variant(_gated_mixer("head,convolved", decay="head", kernel_size=4)),
    _variant(_gated_mixer("retention", nn.RetentionConfig)),
    _delta_mixer("gated", allow_negative_eigenvalues=True),
    _variant(_delta_mixer("grouped,no convolution", num_kv_heads=2, kernel_size=None)),
    _variant(_delta_mixer("no decay", nn.DeltaNetConfig)),
    _memory_mixer("layers=2"),
    _variant(_memory_mixer("layers=1,grouped", depth=1, num_kv_heads=2)),
    _variant(_hybrid_mixer(nn.MemoryAsGateConfig, {"window": 5})),
    _variant(_hybrid_mixer(nn.MemoryAsLayerConfig, {"window": 5}, {"depth": 1})),
    _hybrid_mixer(
        nn.MemoryAsContextConfig, {"window": None}, {"kernel_size": None}, segment_size=8
    ),
    MixerCase(
        name="PersistentAttention",
        config=nn.PersistentAttentionConfig(
            width=16, num_heads=4, num_kv_heads=2, window=5, num_persistent=3, qk_norm=True
        ),
        is_variant=True,
    ),
    MixerCase(
        name="PrefixLinearAttention",
        config=nn.PrefixLinearAttentionConfig(
            width=16, num_heads=4, num_kv_heads=2, feature_dim=4, chunk_size=8, prefix_length=5
        ),
    ),
    MixerCase(name="NGramHeads", config=nn.NGramHeadsConfig(width=16, orders=(1, 3))),
    _variant(_convolution_mixer(1)),
    _convolution_mixer(3),
    _agent_mixer("causal"),
    _variant(
        _agent_mixer("causal,grouped,chunk=8", num_kv_heads=2, chunk_size=8, kernel_size=None)
    ),
    _variant(_agent_mixer("bidirectional", causal=False, kernel_size=None)),
    _core_context_mixer("rope"),
    _variant(_core_context_mixer("nope,grouped", position_encoding="nope", num_kv_heads=2)),
    _variant(_core_context_mixer("rope,grouped,share_cores", num_kv_heads=2, share_cores=True)),
    _routing_mixer("strict,grouped", num_kv_heads=2),
    _variant(
        _routing_mixer("published,nope", strict=False, position_encoding="nope", num_local_heads=0)
    ),
    _hyper_mixer("strict,grouped", num_kv_heads=2),
    _selective_mixer("raw"),
    _variant(
        _selective_mixer(
            "sigmoid,layer,grouped,window=8",
            position="sigmoid",
            position_per_head=True,
            gate_per_head=False,
            num_kv_heads=2,
            window=8,
        )
    ),
    _variant(_selective_mixer("exp,hidden", position="exp", gate_hidden=8)),
    MixerCase(
        name="SmearedAttention[grouped]",
        config=nn.SmearedAttentionConfig(width=16, num_heads=4, num_kv_heads=2, smear_init=0.5),
    ),
    _softplus_mixer("rope,power=15"),
    _variant(
        _softplus_mixer(
            "nope,grouped,power=None", position_encoding="nope", num_kv_heads=2, power=None
        )
    ),
)
