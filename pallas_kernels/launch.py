"""What the launch parameters of all kernels share."""

from collections.abc import Sequence
from typing import Any


def check_fields(config: Any, **allowed: Sequence[int]) -> None:
    """Raises a `ValueError` for the first field of `config` that is none of its allowed values."""
    for name, values in allowed.items():
        value = getattr(config, name)
        if value not in values:
            wanted = f"one of {values}"
            if isinstance(values, range):
                wanted = f"a whole number from {values[0]} to {values[-1]}"
            raise ValueError(f"{type(config).__name__}.{name}: expected {wanted}, got {value!r}")
