"""Optimisers: AdamW as language models are trained with it, and plain gradient descent."""

import dataclasses
from typing import Any, Literal, override

import jax
import optax

from lcattn.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """AdamW with a warm-up and a decay.

    Attributes:
      learning_rate: the peak, reached at step `warmup_steps`.
      schedule: how the rate falls from the peak to `final_lr_fraction` of it: "cosine", "linear",
        or "constant" (does not fall).
      warmup_steps: steps of linear rise before the peak. Step 0 already moves: its rate is
        `learning_rate / (warmup_steps + 1)`.
      decay_steps: the step at which the fall ends; the rate stays there afterwards. None: the
        length of the run.
      final_lr_fraction: the last rate as a fraction of the peak.
      weight_decay: decoupled decay, on arrays of two or more axes only: scales of norms and biases
        are left alone.
      beta1: decay rate of the first moment.
      beta2: decay rate of the second moment.
      epsilon: added to the square root of the second moment.
      clip_norm: gradients of a larger global norm are scaled down to it. None: no clipping.
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0

    @override
    def validate(self) -> None:
        self.require_positive("learning_rate", "epsilon", "clip_norm", "decay_steps")
        if self.warmup_steps < 0:
            raise self.error("warmup_steps", "a value of at least 0")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise self.error("decay_steps", f"more than warmup_steps ({self.warmup_steps})")
        if self.weight_decay < 0:
            raise self.error("weight_decay", "a value of at least 0")
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise self.error(field, "a value in [0, 1)")
        if not 0 <= self.final_lr_fraction <= 1:
            raise self.error("final_lr_fraction", "a value in [0, 1]")

    def make(self, num_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The optimiser of a run of `num_steps` updates, and its learning rate by step."""
        schedule = self.make_schedule(num_steps)
        adamw = optax.adamw(
            schedule,
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=decayed,
        )
        if self.clip_norm is None:
            return adamw, schedule
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw), schedule

    def make_schedule(self, num_steps: int) -> optax.Schedule:
        """The learning rate by step, counted from 0."""
        peak, warmup = self.learning_rate, self.warmup_steps
        # A run shorter than its warm-up (a smoke test of a long config) just never decays.
        fall = max((self.decay_steps or num_steps) - warmup, 1)
        match self.schedule:
            case "cosine":
                decay = optax.cosine_decay_schedule(peak, fall, alpha=self.final_lr_fraction)
            case "linear":
                decay = optax.linear_schedule(peak, peak * self.final_lr_fraction, fall)
            case "constant":
                decay = optax.constant_schedule(peak)
        if warmup == 0:
            return decay
        rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
        return optax.join_schedules([rise, decay], [warmup])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGDConfig(Config):
    """Gradient descent at a constant rate, as small models of learning dynamics are trained.

    Attributes:
      learning_rate: the rate.
      momentum: decay rate of the momentum; 0: none.
      weight_decay: added to the gradient, so that a step scales every parameter by
        `1 - learning_rate * weight_decay`.
      clip_norm: gradients of a larger global norm are scaled down to it. None: no clipping.
    """

    learning_rate: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None

    @override
    def validate(self) -> None:
        self.require_positive("learning_rate", "clip_norm")
        if not 0 <= self.momentum < 1:
            raise self.error("momentum", "a value in [0, 1)")
        if self.weight_decay < 0:
            raise self.error("weight_decay", "a value of at least 0")

    def make(self, num_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The optimiser, and its learning rate by step; the length of the run changes neither."""
        del num_steps
        parts = [
            optax.add_decayed_weights(self.weight_decay) if self.weight_decay else None,
            optax.sgd(self.learning_rate, momentum=self.momentum or None),
        ]
        if self.clip_norm is not None:
            parts.insert(0, optax.clip_by_global_norm(self.clip_norm))
        chain = optax.chain(*(part for part in parts if part is not None))
        return chain, optax.constant_schedule(self.learning_rate)


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: a tree of bools like `params`."""
    return jax.tree.map(lambda param: param.ndim >= 2, params)
