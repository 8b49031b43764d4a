r"""Items and their labels: a classification that can be solved in context or by heart.

A sequence shows N items, each followed by its label, and then a target item, whose label is asked
for: `x_1 l_1 x_2 l_2 .. x_N l_N x_target`, 2N + 1 tokens. There are K classes with L labels (class
k, counted from 0, has label k mod L); the mean of a class and the vector of a label are
iid N(0, 1/D) and stay. An item is its class's mean with noise:

.. math:: x = \frac{\mu_k + \epsilon \eta}{\sqrt{1 + \epsilon^2}}, \qquad \eta \sim N(0, I/D)

so that E|x|² = 1. A token is the one-hot of its place, counted from a random start, and its
content: `[P + D]`, with P = 2 N_max + 1. What decides whether a network reads the label off the
context or learns it by heart is how the classes are drawn:

- class k has probability proportional to (k + 1)^-alpha (Zipf);
- a *bursty* context holds N/B classes, each B times, in random order, and the target is one of
  them; otherwise context and target are drawn alone, and the context rarely helps;
- a sequence of *fresh* classes has means and labels of its own: there is nothing to know by heart.

Source: Reddy, "The mechanistic basis of data dependence and abrupt learning in an in-context
classification task" (ICLR 2024), arXiv 2312.03002; burstiness after Chan et al. (2022), arXiv
2205.05055. Published code draws the classes of a bursty context with replacement (`distinct=None`),
so that a class may come up 2B times, and builds sequences in a Python loop; here they are drawn by
JAX, on the device, from a key.
"""

import dataclasses
from typing import Literal, NamedTuple, override

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.config import Config
from lcattn.typing import Array, Float, Int, PRNGKeyArray


class World(NamedTuple):
    """What stays the same in all sequences.

    Attributes:
      classes: `[K,D]`, the mean of each class.
      labels: `[L,D]`, the vector of each label.
    """

    classes: Float[Array, "K D"]
    labels: Float[Array, "L D"]


class Sequences(NamedTuple):
    """A batch.

    Attributes:
      tokens: `[B, 2N+1, P+D]`.
      labels: `[B,N]`, the labels in the context.
      target: `[B]`, the label that is asked for.
      matches: `[B,N]`, whether an item of the context is of the target's class.
    """

    tokens: Float[Array, "B t d"]
    labels: Int[Array, "B N"]
    target: Int[Array, "B"]
    matches: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemLabelConfig(Config):
    """How sequences are drawn.

    Attributes:
      num_classes: K, a multiple of `num_labels`.
      num_labels: L.
      content_size: D.
      num_items: N, the items in a context.
      max_items: N_max, which sets the number of places, P = 2 N_max + 1.
      noise: epsilon, the spread of a class.
      zipf: alpha.
      burstiness: B, a divisor of N: how often each class of a bursty context appears.
      bursty: share p_B of bursty sequences.
      fresh: share p_C of sequences with classes of their own; they are bursty.
      distinct: what differs between the N/B classes of a bursty context: "classes" (they do),
        "labels" (these do too), or None (nothing has to).
    """

    num_classes: int = 256
    num_labels: int = 32
    content_size: int = 63
    num_items: int = 8
    max_items: int = 32
    noise: float = 0.1
    zipf: float = 0.0
    burstiness: int = 1
    bursty: float = 1.0
    fresh: float = 0.0
    distinct: Literal["classes", "labels"] | None = "classes"

    @override
    def validate(self) -> None:
        self.require_positive(
            "num_classes", "num_labels", "content_size", "num_items", "burstiness"
        )
        if self.num_classes % self.num_labels:
            raise self.error("num_classes", f"a multiple of num_labels={self.num_labels}")
        if self.max_items < self.num_items:
            raise self.error("max_items", f"at least num_items={self.num_items}")
        if self.num_items % self.burstiness:
            raise self.error("burstiness", f"a divisor of num_items={self.num_items}")
        for field in ("noise", "zipf"):
            if getattr(self, field) < 0:
                raise self.error(field, "a value of at least 0")
        for field in ("bursty", "fresh"):
            if not 0 <= getattr(self, field) <= 1:
                raise self.error(field, "a share, 0 to 1")
        available = {"classes": self.num_classes, "labels": self.num_labels}
        if self.distinct and available[self.distinct] < self.num_bursts:
            expected = f"None, or at least {self.num_bursts} {self.distinct}"
            raise self.error("distinct", expected)

    @property
    def num_bursts(self) -> int:
        """Classes in a bursty context, N/B."""
        return self.num_items // self.burstiness

    @property
    def num_places(self) -> int:
        """P."""
        return 2 * self.max_items + 1

    @property
    def width(self) -> int:
        """Size of a token, P + D."""
        return self.num_places + self.content_size

    def world(self, key: PRNGKeyArray) -> World:
        """Means and labels, drawn once."""
        class_key, label_key = jax.random.split(key)
        D = self.content_size
        classes = jax.random.normal(class_key, (self.num_classes, D)) * D**-0.5
        return World(classes, jax.random.normal(label_key, (self.num_labels, D)) * D**-0.5)

    def draw(
        self,
        key: PRNGKeyArray,
        world: World,
        batch_size: int,
        *,
        label_shift: int | Int[Array, ""] = 0,
    ) -> Sequences:
        """Sequences; `label_shift` is added to every label, mod L, against what was learned."""

        def one(key: PRNGKeyArray) -> Sequences:
            return self._sequence(key, world, label_shift)

        return jax.vmap(one)(jax.random.split(key, batch_size))

    def _sequence(self, key: PRNGKeyArray, world: World, label_shift: int | Array) -> Sequences:
        kind_key, bursty_key, alone_key, fresh_key, order_key, noise_key, place_key = (
            jax.random.split(key, 7)
        )
        N, L, D = self.num_items, self.num_labels, self.content_size
        is_bursty, is_fresh = jax.random.uniform(kind_key, (2,)) < jnp.array(
            [self.bursty, self.fresh]
        )
        is_bursty |= is_fresh

        # Of which class the items of the context and the target are: among N + 1 candidates.
        shuffle_key, target_key = jax.random.split(order_key)
        bursts = jax.random.permutation(
            shuffle_key, np.repeat(np.arange(self.num_bursts), self.burstiness)
        )
        chosen = bursts[jax.random.randint(target_key, (), 0, N)]
        candidate = jnp.where(is_bursty, jnp.append(bursts, chosen), jnp.arange(N + 1))

        # What has no share is not drawn: random numbers are most of the work.
        known = jnp.zeros(N + 1, jnp.int32)
        if self.bursty < 1:
            known = jax.random.categorical(alone_key, self._log_law, shape=(N + 1,))
        if self.bursty > 0 and self.fresh < 1:
            burst = known.at[: self.num_bursts].set(self._burst(bursty_key))
            known = jnp.where(is_bursty, burst, known)
        means, labels, identity = world.classes[known], known % L, known
        if self.fresh > 0:
            mean_key, label_key = jax.random.split(fresh_key)
            new_means = jax.random.normal(mean_key, (N + 1, D)) * D**-0.5
            means = jnp.where(is_fresh, new_means, means)
            labels = jnp.where(is_fresh, self._fresh_labels(label_key), labels)
            identity = jnp.where(is_fresh, jnp.arange(N + 1), identity)
        labels = (labels + label_shift) % L

        spread = self.noise * D**-0.5 * jax.random.normal(noise_key, (N + 1, D))
        items = (means[candidate] + spread) * (1 + self.noise**2) ** -0.5
        shown = labels[candidate]
        pairs = jnp.stack([items[:N], world.labels[shown[:N]]], axis=1).reshape(2 * N, D)
        content = jnp.concatenate([pairs, items[N:]])
        start = jax.random.randint(place_key, (), 0, 2 * (self.max_items - N) + 1)
        places = jax.nn.one_hot(start + jnp.arange(2 * N + 1), self.num_places)
        # Two fresh candidates are never of one class; two known ones may be, where drawn alone.
        identity = identity[candidate]
        return Sequences(
            tokens=jnp.concatenate([places, content], axis=-1),
            labels=shown[:N],
            target=shown[N],
            matches=identity[:N] == identity[N],
        )

    @property
    def _log_law(self) -> np.ndarray:
        return -self.zipf * np.log(np.arange(1, self.num_classes + 1, dtype=np.float32))

    def _burst(self, key: PRNGKeyArray) -> Int[Array, "n"]:
        """The classes of a bursty context."""
        n, L = self.num_bursts, self.num_labels
        if self.distinct is None:
            return jax.random.categorical(key, self._log_law, shape=(n,))
        # The n largest of perturbed log probabilities are a draw without replacement.
        perturbed = self._log_law + jax.random.gumbel(key, (self.num_classes,))
        if self.distinct == "classes":
            return jax.lax.top_k(perturbed, n)[1]
        by_label = perturbed.reshape(-1, L)  # class k has label k mod L
        label = jax.lax.top_k(by_label.max(axis=0), n)[1]
        return by_label.argmax(axis=0)[label] * L + label

    def _fresh_labels(self, key: PRNGKeyArray) -> Int[Array, "n"]:
        N, L = self.num_items, self.num_labels
        labels = jax.random.randint(key, (N + 1,), 0, L)
        if self.distinct == "labels":
            n = self.num_bursts
            labels = labels.at[:n].set(jax.random.permutation(key, L)[:n])
        return labels
