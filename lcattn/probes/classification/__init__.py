"""In-context classification (Reddy 2024): networks, evaluations, and models of abrupt learning."""

from lcattn.probes.classification.networks import AttentionNetwork, Reading, TwoParameterNetwork
from lcattn.probes.classification.problem import EVALUATIONS, ItemLabelProblem, progress
from lcattn.probes.classification.three_logit import ThreeLogitRun, three_logit

__all__ = [
    "EVALUATIONS",
    "AttentionNetwork",
    "ItemLabelProblem",
    "Reading",
    "ThreeLogitRun",
    "TwoParameterNetwork",
    "progress",
    "three_logit",
]
