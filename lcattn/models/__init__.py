"""Language models over the library's token mixers, and generation from them."""

from lcattn.models.conversion import convert, converted_config
from lcattn.models.generation import generate, sample
from lcattn.models.lm import LM, Block, LMConfig, LMState

__all__ = [
    "LM",
    "Block",
    "LMConfig",
    "LMState",
    "convert",
    "converted_config",
    "generate",
    "sample",
]
