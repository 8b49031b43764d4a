"""Studies of in-context regression: each trains its seeds, measures them, and draws its part."""

from experiments.regression.algorithms import AlgorithmStudy
from experiments.regression.descent import DescentStudy
from experiments.regression.mechanisms import MechanismStudy
from experiments.regression.optimum import OptimumStudy
from experiments.regression.representation import RepresentationStudy
from experiments.regression.study import Study, against_paper

__all__ = [
    "AlgorithmStudy",
    "DescentStudy",
    "MechanismStudy",
    "OptimumStudy",
    "RepresentationStudy",
    "Study",
    "against_paper",
]
