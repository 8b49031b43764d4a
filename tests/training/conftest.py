import gc
import sys

import pytest


@pytest.fixture
def leftovers(monkeypatch):
    """For tests that break files: what TensorStore and Orbax leave behind ends with the test.

    That is coroutines that nobody awaits, some of the time. Python reports them when it happens to
    collect them, on whatever test runs by then.
    """
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda unraisable: None)
        yield
        gc.collect()
