"""What gin knows: config classes, and factories of configs, by their own names.

Everything that a .gin file may build is listed here and nowhere else.
"""

from experiments import benchmarks, regression
from experiments.benchmarks.measure import TimingConfig
from experiments.gin_config import register
from lcattn import models, nn, probes, tasks, training
from lcattn.probes import classification, forgetting
from lcattn.probes import regression as regression_probes
from lcattn.tasks import algorithmic, languages, roles
from lcattn.tasks import regression as regression_tasks

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
    nn.SmearedAttentionConfig,
    nn.SoftmaxAttentionConfig,
    nn.SoftplusAttentionConfig,
    probes.InductionProblem,
    classification.AttentionNetwork,
    classification.ItemLabelProblem,
    classification.TwoParameterNetwork,
    algorithmic.AlgorithmicConfig,
    languages.AutomataConfig,
    languages.LanguagesConfig,
    roles.RolesConfig,
    tasks.CorpusConfig,
    tasks.DataConfig,
    tasks.ExtrapolationTaskConfig,
    tasks.ItemLabelConfig,
    tasks.MQARConfig,
    tasks.MQARTaskConfig,
    tasks.NeedleConfig,
    tasks.NeedleTaskConfig,
    tasks.PasskeyConfig,
    tasks.RepeatedTokensConfig,
    tasks.TextFolderConfig,
    tasks.TextTaskConfig,
    tasks.standard_library,
    training.MeshConfig,
    training.OptimizerConfig,
    training.SGDConfig,
    training.SeedsConfig,
    training.TrainConfig,
    regression_tasks.LinearRegressionConfig,
    regression_tasks.NetworkRegressionConfig,
    regression_tasks.SineRegressionConfig,
    regression_tasks.random_covariance,
    regression_probes.DescentConfig,
    regression_probes.LSAConfig,
    regression_probes.StreamRegressorConfig,
    regression.AlgorithmStudy,
    regression.DescentStudy,
    regression.MechanismStudy,
    regression.OptimumStudy,
    regression.RepresentationStudy,
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
