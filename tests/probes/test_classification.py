"""Items and labels: networks, progress measures, evaluations, and the three-number model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.probes.classification import (
    AttentionNetwork,
    ItemLabelProblem,
    Reading,
    TwoParameterNetwork,
    progress,
    three_logit,
)
from lcattn.probes.classification.networks import apply_mlp
from lcattn.tasks import ItemLabelConfig
from lcattn.tasks.item_label import Sequences

DATA = ItemLabelConfig(num_classes=64, num_labels=16, content_size=32, num_items=4, max_items=8)
PROBLEM = ItemLabelProblem(data=DATA, eval_size=512)


def test_chance_before_training():
    params, world = PROBLEM.init(jax.random.key(0))
    loss, _ = jax.jit(PROBLEM.loss)(params, world, jax.random.key(1))
    assert loss == pytest.approx(math.log(16), abs=0.15)


def test_the_network_is_the_papers():
    """The whole of both layers, in float64 and without the shortcut to the last token."""
    params, _ = PROBLEM.init(jax.random.key(0))
    tokens = np.random.default_rng(0).standard_normal((9, DATA.width)) / 4
    h = tokens
    for layer in ("first", "second"):
        q, k, v = (h @ np.asarray(params[layer][name], float) for name in ("query", "key", "value"))
        scores = np.where(np.tri(9, dtype=bool), q @ k.T, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        h = h + weights @ v
    reading = AttentionNetwork().read(params, DATA, jnp.asarray(tokens, jnp.float32))
    np.testing.assert_allclose(reading.second, weights[-1], atol=1e-5)
    expected = apply_mlp(params["mlp"], jnp.asarray(h[-1], jnp.float32))
    np.testing.assert_allclose(reading.logits, expected, rtol=1e-4, atol=1e-5)
    assert params["mlp"]["layers"][1]["bias"].shape == ()
    assert params["first"]["query"].std() == pytest.approx(32**-0.5, rel=0.05)


def test_progress_measures_by_hand():
    """Labels read their items by 0.7; the target gives both labels 0.4, one of which is right."""
    first = jnp.zeros((1, 5, 5)).at[0, [1, 3], [0, 2]].set(0.7)
    second = jnp.array([[0.1, 0.4, 0.05, 0.4, 0.05]])
    batch = Sequences(
        tokens=jnp.zeros((1, 5, 3)), labels=jnp.array([[2, 1]]), target=jnp.array([1]),
        matches=jnp.array([[False, True]]),
    )  # fmt: skip
    for answer, expected in ((2, 1.0), (0, 0.0)):
        reading = Reading(jax.nn.one_hot(jnp.array([answer]), 3), first, second)
        measures = progress(reading, batch)
        assert measures["first_to_item"] == pytest.approx(0.7)
        assert measures["second_to_labels"] == pytest.approx(0.8)
        assert measures["second_to_right_labels"] == pytest.approx(0.4)
        assert measures["context_label"] == expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Known(AttentionNetwork):
    """A network whose answers are known: those of the context, or those it has by heart."""

    def read(self, params, data, tokens):
        content = tokens[:, data.num_places :]
        items, labels, target = content[:-1:2], content[1:-1:2], content[-1]
        shown = labels[jnp.argmin(((items - target) ** 2).sum(-1))]
        from_context = -((params["labels"] - shown) ** 2).sum(-1)
        nearest = jnp.argmin(((params["classes"] - target) ** 2).sum(-1))
        by_heart = jax.nn.one_hot(nearest % data.num_labels, data.num_labels)
        logits = jnp.where(params["in_context"], from_context, by_heart)
        return Reading(logits, jnp.zeros((len(tokens),) * 2), jnp.zeros(len(tokens)))


def test_evaluations_tell_context_from_memory():
    problem = PROBLEM.replace(network=_Known())
    _, world = problem.init(jax.random.key(0))
    evaluate = jax.jit(problem.evaluate)
    metrics = evaluate({**world, "in_context": True}, world)
    assert metrics["train/accuracy"] == metrics["ic/accuracy"] == metrics["ic2/accuracy"] == 1
    assert metrics["iw/accuracy"] == pytest.approx(1 / 16, abs=0.12)
    assert metrics["iw/seen"] == pytest.approx(1 - (1 - 1 / 64) ** 4, abs=0.04)
    metrics = evaluate({**world, "in_context": False}, world)
    assert metrics["train/accuracy"] == metrics["iw/accuracy"] == 1
    assert metrics["ic2/accuracy"] == 0
    assert metrics["ic/accuracy"] == pytest.approx(1 / 16, abs=0.04)


def test_the_two_parameters_make_an_induction_head():
    """Looking back at the item and for the target's likes, all weight is on the right label."""
    batch = DATA.draw(jax.random.key(0), DATA.world(jax.random.key(1)), 8)
    params = TwoParameterNetwork().init(jax.random.key(2), DATA)
    for beta, check in ((0.0, lambda x: x < 0.5), (100.0, lambda x: x > 0.8)):
        given = {**params, "beta1": jnp.float32(beta), "beta2": jnp.float32(beta)}
        read = jax.vmap(lambda tokens, p=given: TwoParameterNetwork().read(p, DATA, tokens))
        measures = progress(jax.jit(read)(batch.tokens), batch)
        assert check(measures["first_to_item"])
        assert check(measures["second_to_right_labels"])


@pytest.mark.parametrize(
    ("labels", "losses", "steepest"),
    [(32, {0: 3.466, 100: 3.05, 300: 0.009}, 136), (9, {100: 2.19, 300: 2.13, 1000: 0.003}, None)],
)
def test_three_numbers_learn_in_steps(labels, losses, steepest):
    run = three_logit(labels)
    for step, loss in losses.items():
        assert run.loss[step] == pytest.approx(loss, rel=0.05, abs=5e-4)
    if steepest is not None:
        assert int(jnp.argmin(jnp.diff(run.loss))) == pytest.approx(steepest, rel=0.05)
        # First any label of the context, then the right one.
        assert run.context_label[100] > 1.3 * run.context_label[0]
        assert run.second[100] < 1.1 * run.second[0]


def test_as_many_labels_as_items_are_a_saddle():
    assert three_logit(8, num_steps=20_000).loss[-1] == pytest.approx(math.log(8), rel=1e-4)
    assert three_logit(8, start=(0.0, 1.0, 1.0)).loss[300] == pytest.approx(0.013, rel=0.05)
    with pytest.raises(ValueError, match="num_labels: expected at least num_items=8"):
        three_logit(7)
