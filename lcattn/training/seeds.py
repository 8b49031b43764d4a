"""Small models trained from several seeds at once, as one program.

What an experiment on small models claims should not hang on one seed. A problem says what a seed
trains, `train_seeds` maps it over the seeds: on few cores five tiny models take little longer than
one.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcattn.config import Config
from lcattn.ops import dispatch
from lcattn.training.checkpoint import Checkpointer
from lcattn.training.errors import NonFiniteLossError, TrainingInterrupted
from lcattn.training.optimizer import OptimizerConfig, SGDConfig
from lcattn.training.problem import Intervening, Problem
from lcattn.training.progress import Progress
from lcattn.training.run_dir import Interrupt, lock
from lcattn.training.state import TrainState, Tree
from lcattn.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedsConfig(Config):
    """How several seeds are trained at once.

    Attributes:
      num_steps: updates of the parameters; also the length of the learning-rate schedule.
      optimizer: the optimiser.
      num_seeds: how many; what becomes of one does not depend on their number.
      seed: from which the seeds are counted.
      eval_every: steps between evaluations; divides `num_steps`. None: at both ends only.
      checkpoint_every: steps between checkpoints, a multiple of `eval_every`. None: at the end only
        (and when interrupted).
    """

    num_steps: int
    optimizer: OptimizerConfig | SGDConfig = dataclasses.field(default_factory=OptimizerConfig)
    num_seeds: int = 5
    seed: int = 0
    eval_every: int | None = None
    checkpoint_every: int | None = None

    @override
    def validate(self) -> None:
        self.require_positive("num_steps", "num_seeds", "eval_every", "checkpoint_every")
        if self.num_steps % self.interval:
            raise self.error("eval_every", f"a divisor of num_steps ({self.num_steps})")
        if self.checkpoint_every is not None and self.checkpoint_every % self.interval:
            raise self.error("checkpoint_every", f"a multiple of {self.interval} (eval_every)")

    @property
    def interval(self) -> int:
        """Steps from one evaluation to the next."""
        return self.eval_every or self.num_steps

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide what is computed; the others may change on resume."""
        return {k: v for k, v in self.to_dict().items() if k != "checkpoint_every"}


@dataclasses.dataclass(frozen=True)
class SeedsResult:
    """What a finished run of S seeds leaves.

    Attributes:
      params: trained parameters; every array has a leading axis of S.
      model_state: the other variables, likewise.
      steps: `[E]` the steps after which was evaluated, 0 first.
      metrics: `[E, S, ...]` what `evaluate` gave, by name.
      losses: `[E - 1, S]` mean training loss between two evaluations.
    """

    params: Tree
    model_state: Tree
    steps: np.ndarray
    metrics: dict[str, np.ndarray]
    losses: np.ndarray

    def final(self, name: str) -> np.ndarray:
        """The last evaluation of a metric, `[S, ...]`."""
        return self.metrics[name][-1]


def train_seeds(
    problem: Problem, config: SeedsConfig, run_dir: str | Path | None = None
) -> SeedsResult:
    """Trains every seed, or continues where an earlier call with the same folder stopped.

    Seed s draws all it needs from `fold_in(key(config.seed), s)`. A resumed run ends with the
    values of an unbroken one, bit for bit on the same machine; a finished one is read back.

    Args:
      problem: what to train.
      config: the run.
      run_dir: receives `checkpoints/`. None: nothing is written, and an interrupted run is lost.

    Raises:
      NonFiniteLossError: if the loss or its gradient is NaN or infinite; names step and seed.
      TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint was saved.
      ConfigMismatchError: if the folder holds another problem or run.
      CheckpointError: if a checkpoint cannot be written, or none can be read.
      RunLockedError: if another process trains in this folder.
    """
    if run_dir is None:
        return _run(problem, config, None, None)
    run_dir = Path(run_dir)
    configs = {"problem": problem.to_dict(), "train": config.trajectory()}
    with (
        lock(run_dir),
        contextlib.closing(Checkpointer(run_dir, configs, keep=1)) as checkpointer,
        Interrupt() as interrupt,
    ):
        return _run(problem, config, checkpointer, interrupt)


def _run(
    problem: Problem,
    config: SeedsConfig,
    checkpointer: Checkpointer | None,
    interrupt: Interrupt | None,
) -> SeedsResult:
    state = _init(problem, config)
    history = _History()
    restored = checkpointer.restore(_target(state)) if checkpointer is not None else None
    if restored is not None:
        state, history = restored.state, _History.of(restored.meta["history"])
    else:
        history.evaluated(0, _evaluate(problem, state))
    with contextlib.closing(Progress(config.num_steps, history.step)) as progress:
        while history.step < config.num_steps:
            state, trace = _advance(problem, config, state)
            step = history.step + config.interval
            losses = _checked(jax.device_get(trace), step - config.interval, checkpointer)
            history.trained(losses.mean(axis=1))
            history.evaluated(step, _evaluate(problem, state))
            progress.update(step, float(losses[:, -1].mean()), 0.0)
            if checkpointer is None:
                continue
            last, stop = step == config.num_steps, interrupt is not None and interrupt.signum
            if last or stop or step % (config.checkpoint_every or config.num_steps) == 0:
                checkpointer.save(step, state, {"history": history.to_json()})
            if stop and not last:
                checkpointer.wait()
                raise TrainingInterrupted(stop, step, checkpointer.path(step))
    if checkpointer is not None:
        checkpointer.wait()
    return SeedsResult(state.params, state.model_state, *history.arrays())


def _jit(*, static: int, donate: int | None = None) -> Callable[[Callable], Callable]:
    """`jax.jit` of a function whose first arguments are static, compiled in less time on a CPU.

    Small models take longer to compile than to train. LLVM's first level halves that; the steps
    take no longer, since products of matrices are library calls.
    """

    def decorate(f: Callable) -> Callable:
        @functools.cache
        def compiled(platform: str) -> Callable:
            quick = {"xla_backend_optimization_level": 1}
            return jax.jit(
                f,
                static_argnums=tuple(range(static)),
                donate_argnums=donate,
                compiler_options=quick if platform == "cpu" else None,
            )

        return functools.wraps(f)(lambda *given: compiled(dispatch.default_platform())(*given))

    return decorate


@_jit(static=2)
def _init(problem: Problem, config: SeedsConfig) -> TrainState:
    """The states before the first update."""
    optimizer, _ = config.optimizer.make(config.num_steps)

    def init(seed: Array) -> TrainState:
        key = jax.random.fold_in(jax.random.key(config.seed), seed)
        init_key, rng = jax.random.split(key)
        params, model_state = problem.init(init_key)
        return TrainState(jnp.int32(0), params, model_state, optimizer.init(params), rng)

    return jax.vmap(init)(jnp.arange(config.num_seeds))


@_jit(static=2, donate=2)
def _advance(
    problem: Problem, config: SeedsConfig, state: TrainState
) -> tuple[TrainState, tuple[Float[Array, "seeds steps"], Float[Array, "seeds steps"]]]:
    """The updates up to the next evaluation; also the loss and the norm of the gradient at each."""
    optimizer, _ = config.optimizer.make(config.num_steps)

    def update(state: TrainState, _: None):
        if isinstance(problem, Intervening):
            state = problem.before_update(state)
        key = jax.random.fold_in(state.rng, state.step)
        (loss, model_state), grads = jax.value_and_grad(problem.loss, has_aux=True)(
            state.params, state.model_state, key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, model_state, opt_state, state.rng)
        return state, (loss, optax.tree.norm(grads))

    return jax.vmap(lambda state: jax.lax.scan(update, state, length=config.interval))(state)


@_jit(static=1)
def _evaluate(problem: Problem, state: TrainState) -> Mapping[str, Array]:
    return jax.vmap(problem.evaluate)(state.params, state.model_state)


def _checked(
    trace: tuple[np.ndarray, np.ndarray], start: int, checkpointer: Checkpointer | None
) -> np.ndarray:
    """The losses `[S, steps]`, which are finite, as are the gradients."""
    losses, norms = trace
    bad = np.argwhere(~(np.isfinite(losses) & np.isfinite(norms)).T)
    if len(bad):
        step, seed = bad[0]
        values = {"loss": float(losses[seed, step]), "grad_norm": float(norms[seed, step])}
        latest = checkpointer.latest if checkpointer is not None else None
        raise NonFiniteLossError(start + int(step) + 1, values, None, latest, seed=int(seed))
    return losses


class _History:
    """What was recorded so far, as checkpoints keep it."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.metrics: dict[str, list[np.ndarray]] = {}
        self.losses: list[np.ndarray] = []

    @property
    def step(self) -> int:
        """The last one that was evaluated."""
        return self.steps[-1]

    def evaluated(self, step: int, metrics: Mapping[str, Array]) -> None:
        self.steps.append(step)
        for name, value in jax.device_get(dict(metrics)).items():
            self.metrics.setdefault(name, []).append(np.asarray(value))

    def trained(self, losses: np.ndarray) -> None:
        self.losses.append(losses)

    def arrays(self) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        metrics = {name: np.stack(values) for name, values in self.metrics.items()}
        return np.asarray(self.steps), metrics, np.asarray(self.losses)

    def to_json(self) -> dict[str, Any]:
        """Numbers as Python's, which JSON keeps exactly."""
        return {
            "steps": self.steps,
            "metrics": {
                name: {"dtype": str(values[0].dtype), "values": [v.tolist() for v in values]}
                for name, values in self.metrics.items()
            },
            "losses": [loss.tolist() for loss in self.losses],
        }

    @staticmethod
    def of(saved: Mapping[str, Any]) -> "_History":
        """The inverse of `to_json`."""
        history = _History()
        history.steps = list(saved["steps"])
        for name, metric in saved["metrics"].items():
            history.metrics[name] = [np.asarray(v, metric["dtype"]) for v in metric["values"]]
        history.losses = [np.asarray(loss, np.float32) for loss in saved["losses"]]
        return history


def _target(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
