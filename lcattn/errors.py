"""One way to say that an argument does not fit."""


def argument_error(name: str, expected: str, got: object) -> ValueError:
    """The error for an argument that does not fit: its name, what was expected, what came."""
    return ValueError(f"{name}: expected {expected}, got {got}")
