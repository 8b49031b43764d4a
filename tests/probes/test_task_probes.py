"""Scores against the true law, exact match by length, and when embeddings are forgotten."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcattn import nn
from lcattn.models import LMConfig
from lcattn.probes import forgetting
from lcattn.probes.forgetting import ResetConfig, RolesProblem
from lcattn.probes.languages import language_scores
from lcattn.tasks.languages import AutomataConfig, LanguagesConfig
from lcattn.tasks.roles import RolesConfig, roles_rows
from lcattn.training import OptimizerConfig, SeedsConfig, train_seeds
from lcattn.training.state import TrainState

DATA = RolesConfig(num_words=20)
MODEL = LMConfig(
    vocab_size=DATA.vocab_size, width=4, num_layers=1, pattern=("mixer",), mlp_width=0,
    mixers={"mixer": nn.ShortConvolutionConfig(expand=2)}, init_std=0.1,
)  # fmt: skip


def test_the_true_law_has_no_distance_and_is_always_right():
    automata = AutomataConfig(
        num_letters=4, min_states=3, max_states=4, min_letters=2, max_letters=4
    )
    config = LanguagesConfig(automata=automata, length=20, num_train=1, num_test=5, max_length=6)
    rows = config.make().test
    weights, law = jnp.asarray(rows.weights), jnp.asarray(rows.law)
    perfect = language_scores(law, law, weights)
    np.testing.assert_array_equal(perfect["accuracy_at"], perfect["letters_at"])
    assert not perfect["tvd_at"].any()
    # All on the separator, which is no letter: as far as can be.
    wrong = jnp.zeros_like(law).at[..., config.separator].set(1)
    worst = language_scores(wrong, law, weights)
    np.testing.assert_allclose(worst["tvd_at"], worst["letters_at"], rtol=1e-5)
    assert not worst["accuracy_at"].any()


def test_resets_fall_before_multiples_of_their_interval_and_below_their_end():
    steps = jnp.arange(9)
    due = {
        (None, None): [],
        (2, None): [2, 4, 6, 8],
        (2, 6): [2, 4],  # at 6 it has ended
        (3, 7): [3, 6],
    }
    for (every, until), expected in due.items():
        found = ResetConfig(every=every, until=until).is_due(steps)
        assert steps[found].tolist() == expected


def test_a_reset_draws_the_table_and_forgets_its_moments_alone():
    problem = RolesProblem(
        model=MODEL, data=DATA, reset=ResetConfig(every=2), batch_size=8, num_test=4
    )
    shape = (DATA.vocab_size, MODEL.width)
    params = {"embedding": {"embedding": jnp.ones(shape)}, "norm": {"scale": jnp.ones(4)}}
    moments = optax.ScaleByAdamState(jnp.int32(1), params, params)
    forget = jax.jit(problem.before_update)
    first, second = (
        forget(TrainState(jnp.int32(step), params, {}, (moments,), jax.random.key(1)))
        for step in (1, 2)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, params))
    table = np.asarray(forgetting._table(second.params))
    assert table.std() == pytest.approx(0.1, rel=0.3)
    np.testing.assert_array_equal(second.params["norm"]["scale"], 1)
    (adam,) = second.opt_state
    for moment in (adam.mu, adam.nu):
        assert not moment["embedding"]["embedding"].any()
        assert moment["norm"]["scale"].all()
    assert adam.count == 1


def test_training_resets_and_evaluates():
    """Seeds are reset to tables of their own, and a memory answers by the classes of the words."""
    problem = RolesProblem(
        model=MODEL, data=DATA, reset=ResetConfig(every=2, until=3), batch_size=8, num_test=4
    )
    config = SeedsConfig(
        num_steps=3, num_seeds=2, optimizer=OptimizerConfig(learning_rate=1e-12, weight_decay=0.0)
    )
    result = train_seeds(problem, config)
    tables = np.asarray(forgetting._table(result.params))
    for seed in range(2):
        rng = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))[1]
        key = jax.random.fold_in(jax.random.fold_in(rng, 2), 1)
        np.testing.assert_allclose(tables[seed], problem._table(key), atol=1e-6)
    assert set(result.metrics) == {*forgetting.KINDS, "memory"}

    tokens, targets = roles_rows(DATA, jax.random.key(0), 50)
    plain = (tokens[:, :3].max(axis=1) == DATA.copula) & (targets[:, 4] >= DATA.half)
    nouns = jnp.where(tokens[:, :3] < DATA.half, 1, 0).sum(axis=1) == 1
    known = np.asarray(plain & nouns)
    by_class = forgetting._by_class(DATA, tokens)
    np.testing.assert_array_equal(by_class[known], targets[known])
    switched, _ = roles_rows(DATA, jax.random.key(0), 50, "switch")
    answer = np.asarray(forgetting._by_class(DATA, switched))[:, 4]
    assert ((answer >= DATA.half) & (answer < DATA.num_words)).all()
