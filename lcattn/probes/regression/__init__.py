"""In-context learning as gradient descent: models, constructions, algorithms to compare with.

- the layer: `LSAConfig`, `LSATransformer`, `LSAWeights`, `attend`, `fast_weights`, `roll_out`;
- its exact weights: `gradient_step` (gradient descent and GD++);
- its optimum: `optimum`, `risk`, `recover_matrix`;
- any mechanism as the layer: `MixerRegressorConfig`; behind an MLP: `EmbeddedLSAConfig`;
- algorithms: `learners`, `DescentConfig`, `DescentProblem`, `best_rate`;
- nearness: `alignment`, `sensitivity`, `interpolate`;
- decoders that predict every label: `StreamRegressorConfig`, `StreamProblem`, `agreement`;
- attention as gradient descent, in words of its own: `dual`.

Specs of what is trained are problems of `lcattn.training.train_seeds`.
"""

from lcattn.probes.regression import agreement, dual, learners
from lcattn.probes.regression.alignment import (
    alignment,
    half_mse,
    interpolate,
    normalized_products,
    sensitivity,
)
from lcattn.probes.regression.attention import LSAWeights, attend, fast_weights, read
from lcattn.probes.regression.constructions import gradient_step
from lcattn.probes.regression.descent import (
    DescentConfig,
    DescentProblem,
    best_rate,
    descend,
    evaluation_key,
)
from lcattn.probes.regression.models import EmbeddedLSAConfig, MixerRegressorConfig
from lcattn.probes.regression.optimum import (
    Optimum,
    matrix_cosine,
    optimum,
    recover_matrix,
    risk,
)
from lcattn.probes.regression.problems import RegressionProblem
from lcattn.probes.regression.streams import StreamProblem, StreamRegressorConfig
from lcattn.probes.regression.transformer import LSAConfig, LSATransformer, predict, roll_out

__all__ = [
    "DescentConfig",
    "DescentProblem",
    "EmbeddedLSAConfig",
    "LSAConfig",
    "LSATransformer",
    "LSAWeights",
    "MixerRegressorConfig",
    "Optimum",
    "RegressionProblem",
    "StreamProblem",
    "StreamRegressorConfig",
    "agreement",
    "alignment",
    "attend",
    "best_rate",
    "descend",
    "dual",
    "evaluation_key",
    "fast_weights",
    "gradient_step",
    "half_mse",
    "interpolate",
    "learners",
    "matrix_cosine",
    "normalized_products",
    "optimum",
    "predict",
    "read",
    "recover_matrix",
    "risk",
    "roll_out",
    "sensitivity",
]
