"""What gin knows: config classes, and factories of configs, by their own names.

Everything that a .gin file may build is listed here and nowhere else, but for mixers: those are
all that `lcattn.nn` exports.
"""

from experiments import benchmarks, regression
from experiments.benchmarks.measure import TimingConfig
from experiments.gin_config import register
from lcattn import models, nn, probes, tasks, training
from lcattn.probes import classification, forgetting
from lcattn.probes import regression as regression_probes
from lcattn.tasks import algorithmic, languages, roles
from lcattn.tasks import regression as regression_tasks


def mixer_configs() -> tuple[type[nn.MixerConfig], ...]:
    """Every config that `lcattn.nn` exports and that builds a mixer, by name."""
    exported = (getattr(nn, name) for name in sorted(nn.__all__))
    configs = (c for c in exported if isinstance(c, type) and issubclass(c, nn.MixerConfig))
    return tuple(c for c in configs if not getattr(c.make, "__isabstractmethod__", False))


CONFIGURABLES = (
    models.LMConfig,
    *mixer_configs(),
    forgetting.ResetConfig,
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
