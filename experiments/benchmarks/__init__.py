"""One module an op: its inputs, its cost, our implementations and the peers to compare with."""

from experiments.benchmarks.base import Implementation, OpBenchmark
from experiments.benchmarks.gated import (
    GatedDeltaRuleBenchmark,
    GatedLinearAttentionBenchmark,
)
from experiments.benchmarks.linear_attention import LinearAttentionBenchmark
from experiments.benchmarks.mechanisms import MechanismsBenchmark
from experiments.benchmarks.short_convolution import ShortConvolutionBenchmark
from experiments.benchmarks.softmax_attention import SoftmaxAttentionBenchmark

__all__ = [
    "GatedDeltaRuleBenchmark",
    "GatedLinearAttentionBenchmark",
    "Implementation",
    "LinearAttentionBenchmark",
    "MechanismsBenchmark",
    "OpBenchmark",
    "ShortConvolutionBenchmark",
    "SoftmaxAttentionBenchmark",
]
