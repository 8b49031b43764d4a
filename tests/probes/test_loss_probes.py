"""Losses by position and over training."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcattn import probes


def test_scores_of_positions():
    losses = jnp.log(jnp.array([[8.0, 4.0, 2.0, 1.0]] * 2))
    assert probes.in_context_score(losses, 1, 4) == pytest.approx(-np.log(8))
    with pytest.raises(ValueError, match="early, late"):
        probes.in_context_score(losses, 3, 5)
    falling = -0.7 * np.log(np.arange(1, 9))
    np.testing.assert_allclose(probes.loss_slope(falling), -0.7, rtol=1e-6)


def test_uniform_logits_lose_the_log_of_the_vocabulary():
    losses = probes.token_losses(jnp.zeros((1, 3, 5)), jnp.zeros((1, 3), jnp.int32))
    np.testing.assert_allclose(losses, np.log(5), rtol=1e-6)


def test_the_window_of_the_fastest_change():
    steps = [0, 10, 20, 30, 40, 50]
    assert probes.phase_change(steps, [0, 0, -1, -3, -3.5, -3.6]) == (10, 30)
    assert probes.phase_change(steps, [0, 0.1, 0, -3, -3, -3]) == (20, 30)
    assert probes.phase_change(steps, [1.0] * 6) is None
    with pytest.raises(ValueError, match="scores"):
        probes.phase_change([0], [1.0])


def test_a_path_turns_where_losses_do():
    """Two tokens fall one after the other: two legs of a right angle."""
    losses = np.array([[3, 3], [2, 3], [1, 3], [1, 2], [1, 1.0]])
    path = probes.trajectory(losses)
    legs = path[2] - path[0], path[4] - path[2]
    np.testing.assert_allclose([np.linalg.norm(leg) for leg in legs], 2)
    assert legs[0] @ legs[1] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="components: expected 1 to 2"):
        probes.trajectory(losses, components=3)
