"""Random probabilistic finite automata, in their smallest form, no two of one language."""

import dataclasses
from typing import override

import numpy as np

from lcattn.config import Config
from lcattn.errors import argument_error

_TRIES = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutomataConfig(Config):
    """What automata are drawn from; the defaults are the published ones.

    Each state has 1 to `max_edges` edges, with different letters, to different states other than
    itself; the next letter is uniform over them. All states accept, and state 0 starts.

    Attributes:
      num_letters: letters of the vocabulary. Each automaton uses some of them.
      min_states, max_states: bounds of the number of states, before it is made minimal.
      min_letters, max_letters: bounds of the number of letters that an automaton may use.
      max_edges: most edges that leave a state; never more than there are other states and letters.
    """

    num_letters: int = 18
    min_states: int = 4
    max_states: int = 12
    min_letters: int = 4
    max_letters: int = 18
    max_edges: int = 3

    @override
    def validate(self) -> None:
        self.require_positive("min_letters", "max_edges")
        if self.min_states < 2:
            raise self.error("min_states", "at least 2, since an edge leads to another state")
        if self.max_states < self.min_states:
            raise self.error("max_states", f"at least min_states={self.min_states}")
        if not self.min_letters <= self.max_letters <= self.num_letters:
            bounds = f"from min_letters={self.min_letters} to num_letters={self.num_letters}"
            raise self.error("max_letters", bounds)


def random_automata(config: AutomataConfig, count: int, seed: int) -> list[np.ndarray]:
    """Automata of `count` different languages.

    The published set removes no duplicates, since its automata are compared by identity. Here two
    are one if they accept the same strings, which their minimal forms show.

    Args:
      config: what to draw from.
      count: how many.
      seed: of the draws.

    Returns:
      Transition tables `[states, letters]` in their minimal form (see `minimal`).

    Raises:
      ValueError: if there do not seem to be so many.
    """
    rng = np.random.default_rng(seed)
    found: dict[bytes, np.ndarray] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        table = minimal(_draw(config, rng))
        found.setdefault(table.tobytes(), table)
    if len(found) < count:
        raise argument_error("count", f"at most the {len(found)} languages that were found", count)
    return list(found.values())


def minimal(table: np.ndarray) -> np.ndarray:
    """The smallest automaton of the same strings, its states in the order they are reached.

    All states accept, so a state is told from another by the letters that can follow it, then by
    where these lead: classes of states are refined until nothing changes (Moore 1956). Numbered
    breadth first, letter by letter, two automata of one language are the same table.

    Args:
      table: `[states, letters]`: the next state, -1 where there is no edge. State 0 starts.

    Returns:
      Such a table, int8, without states that are not reached.
    """
    kinds, classes = 0, np.zeros(len(table), np.int64)
    while (number := len(np.unique(classes))) > kinds:
        kinds = number
        after = np.where(table < 0, -1, classes[table])
        _, classes = np.unique(np.column_stack([classes, after]), axis=0, return_inverse=True)

    number = np.full(kinds, -1)
    number[classes[0]] = 0
    reached = [0]
    for state in reached:  # It grows while we go through it.
        for following in table[state]:
            if following >= 0 and number[classes[following]] < 0:
                number[classes[following]] = len(reached)
                reached.append(following)
    edges = table[reached]
    return np.where(edges < 0, -1, number[classes[edges]]).astype(np.int8)


def _draw(config: AutomataConfig, rng: np.random.Generator) -> np.ndarray:
    states = rng.integers(config.min_states, config.max_states + 1)
    letters = rng.integers(config.min_letters, config.max_letters + 1)
    alphabet = rng.permutation(config.num_letters)[:letters]
    most = min(config.max_edges, states - 1, letters)
    table = np.full((states, config.num_letters), -1)
    for state, edges in enumerate(rng.integers(1, most + 1, states)):
        others = rng.permutation(states - 1)[:edges]
        table[state, rng.permutation(alphabet)[:edges]] = others + (others >= state)
    return table
