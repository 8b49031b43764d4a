"""N-gram attention: the mean of what followed earlier occurrences of the last n tokens."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.typing import Array, Bool, Float, Int, Tokens

_DENSE_UP_TO = 512  # tokens: until then T² comparisons cost less than a sort


@sharding.partitioned
def ngram_attention(
    x: Float[Array, "B S D"],
    tokens: Int[Array, "B S"],
    *,
    orders: Sequence[int] = (1, 2),
    include_self: bool = True,
    segment_ids: Int[Array, "B S"] | None = None,
    query_position: int | Array = 0,
    num_queries: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T O D"]:
    r"""The hard-wired heads of in-context language learning: nothing is learned in them.

    Head n of token i attends, evenly, to the tokens that came after the same n tokens that end in
    token i. Layout `[B,T,D]`; sums in float32, output in the dtype of `x`.

    .. math::
        A^{(n)}_{ij} \propto \prod_{k=0}^{n-1} [t_{i-k} = t_{j-1-k}], \quad j \le i,
        \qquad y^{(n)}_i = \sum_j A^{(n)}_{ij} x_j

    Rows are divided by their number of matches; a row without one is zero, as is one with fewer
    than n tokens up to it. With one-hot x, head n gives the empirical law of the next token after
    the last n tokens: n is the number of tokens of context, so head 1 is the bigram model, which
    the paper's code calls order 1 too, and its text the 2-gram.

    Differs from the published code, which shifts the matches by one token and then masks j >= i:
    the newest token is never attended, and in "a a" the repeat goes unnoticed until a third token
    comes. Here j = i counts, as in the formula; `include_self=False` is the published code.

    Time O(T D log T) and memory O(T (D + log T)) for each order ("xla"), or O(T²) ("reference").

    Source: Akyürek et al., "In-Context Language Learning: Architectures and Algorithms" (2024),
    arXiv:2401.12973.

    Args:
      x: what is averaged `[B,S,D]`.
      tokens: ids `[B,S]`. A negative one matches nothing.
      orders: the numbers of tokens n that have to match, one head each.
      include_self: whether a token may attend to itself (in a run of one token it does).
      segment_ids: document of each token `[B,S]`, for packed rows: n-grams do not reach across.
      query_position: index of the first token to give an output for; the others are its past.
      num_queries: how many tokens T to give an output for. None: all S, from index 0.
      implementation: "xla" (sorts n-grams, then sums each one's followers in order; whole rows
        only), "reference" (compares all pairs), or None.

    Returns:
      `[B,T,O,D]`, an output for each order.

    Raises:
      ValueError: for arguments that do not fit.
    """
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise argument_error("x", "3 axes [B,S,D], none but B empty", f"shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise argument_error("x", "a floating-point dtype", x.dtype)
    B, S, _ = x.shape
    checks.check_shape("tokens", tokens, (B, S), "[B,S]")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise argument_error("tokens", "an integer dtype", tokens.dtype)
    if not orders:
        raise argument_error("orders", "at least one order", orders)
    for order in orders:
        checks.check_size("orders", order)
    if segment_ids is None:
        ids = jnp.zeros((B, S), jnp.int32)
    else:
        checks.check_segment_ids(segment_ids, (B, S))
        ids = segment_ids
    whole = num_queries is None
    if whole and not (isinstance(query_position, int) and query_position == 0):
        raise argument_error("num_queries", "a number where query_position is given", None)

    run = dispatch.choose("ngram_attention", implementation, S=S, whole=whole)
    past = [_back(tokens, ids, k) for k in range(max(orders) + 1)]
    out = run(
        x, past, ids, tuple(orders), include_self,
        query_position=query_position, num_queries=S if num_queries is None else num_queries,
    )  # fmt: skip
    return out.astype(x.dtype)


def _back(tokens: Tokens, ids: Array, k: int) -> Tokens:
    """The token k before each one, and -1 where its document has none."""

    def shifted(array: Array) -> Array:
        return jnp.pad(array, ((0, 0), (k, 0)), constant_values=-1)[:, : array.shape[1]]

    return jnp.where((shifted(ids) == ids) & (ids >= 0), shifted(tokens), -1)


def _all_pairs(
    x: Array,
    past: list[Tokens],
    ids: Array,
    orders: tuple[int, ...],
    include_self: bool,
    *,
    query_position: int | Array,
    num_queries: int,
) -> Array:
    dtype = checks.accumulation_dtype(x.dtype)

    def at_queries(array: Array) -> Array:
        if num_queries == array.shape[1]:
            return array
        return lax.dynamic_slice_in_dim(array, query_position, num_queries, axis=1)

    # Key j is compared by the tokens before it.
    key, query = jnp.arange(x.shape[1]), query_position + jnp.arange(num_queries)
    sees = key <= query[:, None] if include_self else key < query[:, None]
    match = sees & (at_queries(ids)[:, :, None] == ids[:, None, :])
    outputs = {}
    for n in range(1, max(orders) + 1):
        own = at_queries(past[n - 1])[:, :, None]
        match &= (own == past[n][:, None, :]) & (own >= 0)
        if n in orders:
            weights = match.astype(dtype)
            total = jnp.einsum("bts,bsd->btd", weights, x.astype(dtype))
            outputs[n] = total / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1)
    return jnp.stack([outputs[n] for n in orders], axis=2)


def _sorted(
    x: Array,
    past: list[Tokens],
    ids: Array,
    orders: tuple[int, ...],
    include_self: bool,
    *,
    query_position: int | Array,
    num_queries: int,
) -> Array:
    del query_position, num_queries  # whole rows
    dtype = checks.accumulation_dtype(x.dtype)
    follows = functools.partial(_followers, x.astype(dtype), ids, include_self=include_self)
    return jnp.stack([follows(past[: n + 1]) for n in orders], axis=2)


def _followers(x: Array, ids: Array, past: list[Tokens], *, include_self: bool) -> Array:
    """The mean over earlier keys of a query's own n-gram, for one order n."""
    previous_key, newest_key, found = _links(ids, past, include_self)
    totals = _sums_along(previous_key, jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1))
    totals = jnp.take_along_axis(totals, newest_key[..., None], axis=1)
    return jnp.where(found[..., None], totals[..., :-1] / jnp.maximum(totals[..., -1:], 1), 0)


def _links(
    ids: Array, past: list[Tokens], include_self: bool
) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Bool[Array, "B S"]]:
    """For each token as a key: the key before it under the same n-gram, -1 for none. As a query:
    the newest key under its n-gram, and whether there is one.

    A token is two events: as a key, under the n-gram before it, and as a query, under the n-gram
    that ends in it. A stable sort brings the events of one n-gram together, in order of time.
    """
    B, S = ids.shape
    query_place = 1 if include_self else 0  # whether it comes before or after its own key

    def events(key: Array, query: Array) -> Array:
        pair = (key, query) if include_self else (query, key)
        return jnp.stack(pair, axis=2).reshape(B, 2 * S)

    ngram = [events(ids, ids), *(events(k, q) for k, q in zip(past[1:], past[:-1], strict=True))]
    valid = functools.reduce(jnp.logical_and, (part >= 0 for part in ngram))
    place = jnp.broadcast_to(jnp.arange(2 * S, dtype=jnp.int32), (B, 2 * S))
    *ngram, order = lax.sort((*ngram, place), num_keys=len(ngram), is_stable=True)

    def newest(where: Array) -> Array:
        """The last sorted place before or at each one where a condition holds, -1 for none."""
        return lax.cummax(jnp.where(where, place, -1), axis=1)

    def padded(array: Array, fill: bool | int) -> Array:
        return jnp.pad(array[:, :-1], ((0, 0), (1, 0)), constant_values=fill)

    same = functools.reduce(jnp.logical_and, (part == padded(part, -2) for part in ngram))
    before = padded(newest(order % 2 != query_place), -1)
    in_group = before >= newest(~same)
    key = jnp.take_along_axis(order // 2, jnp.maximum(before, 0), axis=1)
    key = jnp.where(in_group, key, -1)

    key = jnp.take_along_axis(key, jnp.argsort(order, axis=1), axis=1)
    at_queries = slice(query_place, None, 2)
    newest_key = key[:, at_queries]
    return key[:, 1 - query_place :: 2], newest_key, valid[:, at_queries] & (newest_key >= 0)


def _sums_along(previous: Int[Array, "B S"], x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """The sum over each token and all those it is linked to, by doubling the steps.

    The order of summation depends on nothing but the chain, so what comes later moves no bit.
    """
    for _ in range((x.shape[1] - 1).bit_length()):
        here = jnp.maximum(previous, 0)
        is_linked = previous >= 0
        x = x + jnp.where(is_linked[..., None], jnp.take_along_axis(x, here[..., None], axis=1), 0)
        previous = jnp.where(is_linked, jnp.take_along_axis(previous, here, axis=1), -1)
    return x


def _needs_whole_rows(*, whole: bool, **call: object) -> str | None:
    del call
    return None if whole else "gives outputs for whole rows only, not for some queries"


def _long_enough(*, S: int, **call: object) -> bool:
    del call
    return S > _DENSE_UP_TO


dispatch.declare(
    "ngram_attention",
    {
        "xla": dispatch.Implementation(_sorted, _needs_whole_rows, _long_enough),
        "reference": dispatch.Implementation(_all_pairs),
    },
)
