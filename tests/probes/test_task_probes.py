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


def test_who_knows_the_classes_answers_by_them():
    tokens, targets = roles_rows(DATA.replace(ambiguous=False), jax.random.key(0), 20)
    np.testing.assert_array_equal(forgetting._by_class(DATA, tokens), targets)
    switched, targets = roles_rows(DATA, jax.random.key(0), 20, "switch")
    answers = np.asarray(forgetting._by_class(DATA, switched))
    assert (answers[:, 4:] != targets[:, 4:]).any(axis=1).all()
    assert (answers[:, 4] >= DATA.half).all()
