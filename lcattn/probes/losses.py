"""What losses show: in-context learning, and when it came.

The in-context score and the per-token losses are those of Olsson et al. (2022), arXiv 2209.11895.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.errors import argument_error
from lcattn.typing import Array, Float, Logits, Tokens


def token_losses(logits: Logits, targets: Tokens) -> Float[Array, "B T"]:
    """The loss of each token, in nats and float32."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]


def in_context_score(losses: Float[Array, "*batch T"], early: int, late: int) -> Float[Array, ""]:
    """Mean loss at token `late` minus that at token `early`, both counted from 1.

    The more negative, the more was learned in context. The paper takes tokens 50 and 500 of 512.
    """
    T = losses.shape[-1]
    if not 1 <= early < late <= T:
        raise argument_error("early, late", f"1 <= early < late <= {T}", f"{early}, {late}")
    return (losses[..., late - 1] - losses[..., early - 1]).mean()


def loss_slope(by_position: Float[np.ndarray, "*any T"]) -> Float[np.ndarray, "*any T"]:
    """`d loss / d log(position)`, positions counted from 1, by central differences.

    Negative where later tokens are still predicted better than earlier ones.
    """
    T = by_position.shape[-1]
    logs = np.log(np.arange(1, T + 1))
    right, left = np.minimum(np.arange(T) + 1, T - 1), np.maximum(np.arange(T) - 1, 0)
    return (by_position[..., right] - by_position[..., left]) / (logs[right] - logs[left])


def trajectory(
    losses: Float[np.ndarray, "snapshots tokens"], components: int = 2
) -> Float[np.ndarray, "snapshots components"]:
    """Principal components of per-token losses over training, `[snapshots, components]`.

    Each snapshot is the vector of losses on one fixed set of tokens. Where a model begins to do
    something else, the path turns.
    """
    losses = np.asarray(losses, np.float64)
    if not 0 < components <= min(losses.shape):
        raise argument_error("components", f"1 to {min(losses.shape)}", components)
    u, s, _ = np.linalg.svd(losses - losses.mean(axis=0), full_matrices=False)
    return u[:, :components] * s[:components]


def phase_change(
    steps: Sequence[int], scores: Sequence[float | int], *, share: float = 0.5
) -> tuple[int, int] | None:
    """The steps between which a score changed fastest.

    The fastest change between two neighbouring evaluations, and what lies around it at `share` of
    its rate or more, as long as the sign stays the same. None where nothing changes.
    """
    if len(steps) != len(scores) or len(steps) < 2:
        raise argument_error("scores", f"one for each of 2 or more steps ({len(steps)})", scores)
    rates = np.diff(np.asarray(scores, float)) / np.diff(np.asarray(steps, float))
    peak = int(np.abs(rates).argmax())
    if rates[peak] == 0:
        return None
    fast = rates / rates[peak] >= share
    first = last = peak
    while first > 0 and fast[first - 1]:
        first -= 1
    while last + 1 < len(fast) and fast[last + 1]:
        last += 1
    return int(steps[first]), int(steps[last + 1])
