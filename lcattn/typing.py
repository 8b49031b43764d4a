"""The axis alphabet, and the array types that public signatures are written in.

One letter means one thing in every signature, docstring and kernel of the library:

| letter | axis                                       |
| ------ | ------------------------------------------ |
| `B`    | batch                                      |
| `T`    | queries (new tokens)                       |
| `S`    | keys; equal to `T` in self-attention       |
| `N`    | query heads                                |
| `K`    | key/value heads; `N % K == 0`              |
| `H`    | head size of values (and of q, k where F is absent) |
| `F`    | size of queries and keys where it differs from `H`, as in linear attention |
| `D`    | model width; in a recurrent state, the expanded feature size |
| `V`    | vocabulary                                 |

Arrays of heads are laid out `[B, T, N, H]`.
"""

from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]
Values = Float[Array, "B S K H"]

SegmentIds = Int[Array, "B T"]
"""Document of each token. Non-decreasing along a row; a negative id marks padding, which attends
to nothing, is attended by nothing, and gives zeros."""

Positions = Int[Array, "B T"]
"""Position of each token within its document, counted from 0."""

Hidden = Float[Array, "B T D"]
Tokens = Int[Array, "B T"]
Logits = Float[Array, "B T V"]

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Hidden",
    "Int",
    "Key",
    "Keys",
    "Logits",
    "PRNGKeyArray",
    "Positions",
    "Queries",
    "SegmentIds",
    "Shaped",
    "Tokens",
    "Values",
]
