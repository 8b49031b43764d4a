"""The library's own mechanisms as cases of the suite."""

from lcattn.testing.conformance.catalog.mixers import MIXERS
from lcattn.testing.conformance.catalog.ops import OPS

__all__ = ["MIXERS", "OPS"]
