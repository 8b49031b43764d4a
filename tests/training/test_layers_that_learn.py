"""Layers with losses of their own, and with variables that they learn outside the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy import Batches, ToyLM

from lcattn.models import LMConfig
from lcattn.nn import AuxiliaryLoss, RoutingAttentionConfig
from lcattn.training import MeshConfig
from lcattn.training.evaluation import device_batch
from lcattn.training.state import ModelDef, TrainState, abstract_model, abstract_state, init_state
from lcattn.training.step import make_train_step


@functools.cache
def _after_one_step(*, commitment_weight=1e-4, remat=False, devices=1):
    """Parameters and other variables of a language model after one step of gradient descent."""
    config = LMConfig(
        vocab_size=11, width=16, num_layers=1, pattern=("routing",), mlp_width=0, remat=remat,
        mixers={"routing": RoutingAttentionConfig(
            num_heads=4, num_clusters=3, cluster_size=4, window=3, init_std=0.5,
            commitment_weight=commitment_weight,
        )},
    )  # fmt: skip
    mesh = MeshConfig().make(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        optimizer = optax.sgd(1.0)
        model_def, params, model_state = abstract_model(config, mesh)
        state = init_state(
            config, optimizer, 0, abstract_state(params, model_state, optimizer, mesh)
        )
        step = make_train_step(model_def, optimizer, lambda _: 1.0)
        new, _ = jax.jit(step)(state, device_batch(next(Batches(4, 9)), mesh))
    return jax.tree.map(np.asarray, (new.params, new.model_state))


def _mixer_of(tree):
    return tree["blocks"][0]["mixer"]


@pytest.mark.parametrize("options", [{"remat": True}, {"devices": 2}])
def test_a_training_step_updates_once_for_the_whole_batch(options):
    """Neither recomputed blocks nor a batch on several devices change what centroids learn."""
    expected, found = _after_one_step(), _after_one_step(**options)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_a_training_step_adds_the_commitment_loss():
    """Its gradient reaches the queries."""
    (light, state), (heavy, _) = _after_one_step(), _after_one_step(commitment_weight=1.0)
    kernels = (_mixer_of(params)["query"]["kernel"] for params in (light, heavy))
    assert np.abs(np.subtract(*kernels)).max() > 1e-3
    assert _mixer_of(state)["commitment_loss"] > 0


class PenalizedLM(ToyLM):
    """Wants its biases to be 2."""

    def __init__(self):
        super().__init__(vocab_size=11, width=4, rngs=nnx.Rngs(0))
        self.penalty = AuxiliaryLoss(jnp.zeros(()))

    def __call__(self, tokens, segment_ids=None, *, rng=None):
        self.penalty[...] = jnp.sum(jnp.square(self.bias[...] - 2))
        return super().__call__(tokens, segment_ids, rng=rng)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_auxiliary_losses_are_averaged_over_microbatches(num_microbatches):
    model = PenalizedLM()
    params, model_state = ModelDef.split(model)
    optimizer = optax.sgd(1.0)
    step = make_train_step(
        ModelDef.of(model), optimizer, lambda _: 1.0, num_microbatches=num_microbatches
    )
    batch = {k: jnp.asarray(x) for k, x in next(Batches()).items()}
    batch["weights"] = jnp.zeros_like(batch["weights"])  # no loss but the penalty
    state = TrainState(jnp.int32(0), params, model_state, optimizer.init(params), jax.random.key(0))
    new, _ = jax.jit(step)(state, batch)
    np.testing.assert_allclose(new.params["bias"], 4, rtol=1e-6)
    assert new.model_state["penalty"] == 11 * 4
