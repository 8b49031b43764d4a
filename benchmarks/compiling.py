"""Compiles the programs of a script side by side, before anything is timed.

While it compiles, XLA tries out products on the device, and so would disturb what is timed.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from jax.experimental import serialize_executable

UNTUNED = {"xla_gpu_autotune_level": 0}
"""Options of programs that are not timed. XLA tries out no products for them, which takes long."""


def compile_all[Key](programs: Mapping[Key, Callable[[], Any]]) -> dict[Key, Any]:
    """Compiles in threads, as is best for programs that XLA makes."""
    with ThreadPoolExecutor() as pool:
        futures = {key: pool.submit(program) for key, program in programs.items()}
        return {key: future.result() for key, future in futures.items()}


class Workers:
    """Compiles in processes, as is best for programs with kernels of ours; leaving waits for all.

    Lowering a kernel is seconds of Python, in which the threads of one process take turns. The
    processes are forked at once, which has to come before anything that starts JAX.
    """

    def __init__(self, processes: int = 6):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all share the device's memory
        context = multiprocessing.get_context("fork")
        self._processes = ProcessPoolExecutor(processes, mp_context=context)
        self._processes.submit(int).result()  # with the first task, all are forked
        self._threads = ThreadPoolExecutor(64)  # most of which only wait for a process

    def compile(self, build: Callable[..., Any], *arguments: Any, **options: Any) -> Future:
        """What a function of a module, `build(*arguments)`, compiles."""
        program = self._processes.submit(_serialized, build, *arguments, **options)

        def load():
            try:
                return serialize_executable.deserialize_and_load(*program.result())
            except Exception as error:  # here it fails again, or it was the process
                print(f"compiled anew: {error!r}"[:300], flush=True)
                return build(*arguments, **options)

        return self.run(load)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Future:
        """Calls a function in a thread."""
        return self._threads.submit(function, *arguments, **options)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown()
        self._processes.shutdown()


def _serialized(build: Callable[..., Any], *arguments: Any, **options: Any) -> tuple:
    return serialize_executable.serialize(build(*arguments, **options))
