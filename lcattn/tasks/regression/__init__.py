"""In-context regression: a new function in every row, a few examples of it, and a query."""

from lcattn.tasks.regression.batch import Regression, RegressionTask
from lcattn.tasks.regression.functions import NetworkRegressionConfig, SineRegressionConfig
from lcattn.tasks.regression.laws import FOURTH_MOMENT, SECOND_MOMENT, Law, draw
from lcattn.tasks.regression.linear import LinearRegressionConfig, random_covariance

__all__ = [
    "FOURTH_MOMENT",
    "SECOND_MOMENT",
    "Law",
    "LinearRegressionConfig",
    "NetworkRegressionConfig",
    "Regression",
    "RegressionTask",
    "SineRegressionConfig",
    "draw",
    "random_covariance",
]
