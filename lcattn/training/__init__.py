"""Training: optimiser, loss, mesh, checkpoints, metrics, and the loop that joins them."""

from lcattn.training.checkpoint import load_model
from lcattn.training.config import TrainConfig, TrainResult
from lcattn.training.errors import (
    CheckpointError,
    ConfigMismatchError,
    NonFiniteLossError,
    RunLockedError,
    TrainingInterrupted,
)
from lcattn.training.evaluation import evaluate
from lcattn.training.loop import train
from lcattn.training.losses import LossSums, cross_entropy
from lcattn.training.mesh import MeshConfig
from lcattn.training.metrics import JsonlWriter, MetricWriter, TensorBoardWriter, read_jsonl
from lcattn.training.optimizer import OptimizerConfig, SGDConfig
from lcattn.training.problem import Intervening, ModelProblem, Problem, TokenProblem
from lcattn.training.seeds import SeedsConfig, SeedsResult, train_seeds

__all__ = [
    "CheckpointError",
    "ConfigMismatchError",
    "Intervening",
    "JsonlWriter",
    "LossSums",
    "MeshConfig",
    "MetricWriter",
    "ModelProblem",
    "NonFiniteLossError",
    "OptimizerConfig",
    "Problem",
    "RunLockedError",
    "SGDConfig",
    "SeedsConfig",
    "SeedsResult",
    "TensorBoardWriter",
    "TokenProblem",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "cross_entropy",
    "evaluate",
    "load_model",
    "read_jsonl",
    "train",
    "train_seeds",
]
