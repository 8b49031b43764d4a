"""Eight CPU devices, one compilation cache, and a switch for the jaxtyping hook."""

import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "jax"

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # Tests compile much and run little.
    " --xla_backend_optimization_level=0"
    # Eight devices share a few cores, and one that waits too long for the others ends the process.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Compiling is most of what the tests do; programs of an earlier run are read back.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import gc  # noqa: E402
import itertools  # noqa: E402

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000
TESTS = itertools.count()


@pytest.fixture(autouse=True)
def drop_programs():
    """Forgets compiled programs once they are many.

    Each holds some twenty memory maps. Linux gives a process 65,530 of them, and past that XLA ends
    in a segmentation fault.
    """
    yield
    if next(TESTS) % 20 or not MAPS.exists():
        return
    if MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def no_type_hook():
    """Lets wrong ranks and dtypes through to the library's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
