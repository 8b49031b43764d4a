"""The config classes that gin knows, by their own names.

Everything a .gin file may build is listed here and nowhere else.
"""

from experiments import benchmarks
from experiments.benchmarks.measure import TimingConfig
from experiments.gin_config import register

CONFIGS = (
    benchmarks.LinearAttentionBenchmark,
    benchmarks.ShortConvolutionBenchmark,
    benchmarks.SoftmaxAttentionBenchmark,
    TimingConfig,
)


def register_all() -> None:
    """Makes every config class known to gin."""
    for config in CONFIGS:
        register(config)
