"""What gin knows: config classes, and factories of configs, by their own names.

Everything that a .gin file may build is listed here and nowhere else.
"""

from experiments import benchmarks
from experiments.benchmarks.measure import TimingConfig
from experiments.gin_config import register
from lcattn import models, nn, tasks, training
from lcattn.probes import forgetting
from lcattn.tasks import algorithmic, languages, roles

CONFIGURABLES = (
    models.LMConfig,
    forgetting.ResetConfig,
    nn.AgentAttentionConfig,
    nn.CoreContextAttentionConfig,
    nn.DeltaNetConfig,
    nn.GatedDeltaNetConfig,
    nn.GatedLinearAttentionConfig,
    nn.HyperAttentionConfig,
    nn.LinearAttentionConfig,
    nn.MemoryAsContextConfig,
    nn.MemoryAsGateConfig,
    nn.MemoryAsLayerConfig,
    nn.NGramHeadsConfig,
    nn.NeuralMemoryConfig,
    nn.PersistentAttentionConfig,
    nn.PrefixLinearAttentionConfig,
    nn.RetentionConfig,
    nn.RoutingAttentionConfig,
    nn.SelectiveAttentionConfig,
    nn.ShortConvolutionConfig,
    nn.SoftmaxAttentionConfig,
    nn.SoftplusAttentionConfig,
    algorithmic.AlgorithmicConfig,
    languages.AutomataConfig,
    languages.LanguagesConfig,
    roles.RolesConfig,
    tasks.CorpusConfig,
    tasks.DataConfig,
    tasks.ExtrapolationTaskConfig,
    tasks.MQARConfig,
    tasks.MQARTaskConfig,
    tasks.NeedleConfig,
    tasks.NeedleTaskConfig,
    tasks.PasskeyConfig,
    tasks.TextFolderConfig,
    tasks.TextTaskConfig,
    tasks.standard_library,
    training.MeshConfig,
    training.OptimizerConfig,
    training.SeedsConfig,
    training.TrainConfig,
    TimingConfig,
    benchmarks.GatedDeltaRuleBenchmark,
    benchmarks.GatedLinearAttentionBenchmark,
    benchmarks.LinearAttentionBenchmark,
    benchmarks.MechanismsBenchmark,
    benchmarks.ShortConvolutionBenchmark,
    benchmarks.SoftmaxAttentionBenchmark,
)


def register_all() -> None:
    """Makes everything above known to gin."""
    for configurable in CONFIGURABLES:
        register(configurable)
