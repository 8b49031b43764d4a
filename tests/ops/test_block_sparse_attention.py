"""What only plans of blocks must hold: lists, their transposition, parts that are merged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

import lcattn.ops
from lcattn.ops.block_sparse_attention import blockwise, tpu_kernel
from lcattn.ops.merging import merge
from lcattn.ops.visibility import NEVER, Visibility
from pallas_kernels.block_sparse_attention import mosaic_tpu
from pallas_kernels.block_sparse_attention.items import FULL, SKIPPED

B, T, S, N, K, H = 2, 21, 26, 4, 2, 4
QUERY_BLOCK, KEY_BLOCK = 4, 3
M, BLOCKS = -(-T // QUERY_BLOCK), -(-S // KEY_BLOCK)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _draw(dtype="float64"):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _lists(chosen):
    """Ascending lists of what a mask `[...,size]` chooses, filled up with rubbish, and lengths."""
    count = chosen.sum(axis=-1).astype(np.int32)
    order = np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32)
    is_listed = np.arange(chosen.shape[-1]) < count[..., None]
    return np.where(is_listed, order, 10**6 * (-1) ** order), count


def _random_plan(heads=N, *, density=0.5):
    """Random lists, columns and rule; the first block of queries has nothing."""
    rng = np.random.default_rng(1)
    chosen = rng.random((B, heads, M, BLOCKS)) < density
    single = ~np.repeat(chosen, KEY_BLOCK, axis=-1)[..., :S] & (rng.random(S) < 0.3)
    chosen[:, :, 0] = single[:, :, 0] = False
    blocks, count = _lists(chosen)
    columns, column_count = _lists(single)
    begin = rng.integers(-5, 15, (1, heads, S))
    end = begin + rng.integers(-6, 20, (1, heads, S))
    # Whole blocks whose keys end before they begin, each hidden from one position.
    end[..., -2 * KEY_BLOCK :] = begin[..., -2 * KEY_BLOCK :] - 1
    seen = rng.integers(-1, T, (B, 1, T)), begin, end
    plan = ops.BlockPlan(
        blocks=blocks, count=count, log_weight=rng.standard_normal(blocks.shape),
        columns=ops.PlanColumns(columns, column_count, rng.standard_normal(columns.shape)),
        seen=Visibility(*(x.astype(np.int32) for x in seen)),
        query_block=QUERY_BLOCK, key_block=KEY_BLOCK,
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, plan)


def _sees(p, begin, end):
    return (begin <= p) & (p < end) | (end < begin) & ~((end <= p) & (p < begin))


def _numpy(tree):
    return jax.tree.map(np.asarray, tree)


_kinds = jax.jit(ops.BlockPlan.kinds)
_transposed = jax.jit(ops.BlockPlan.transposed)


@jax.jit
def _mask(plan):
    return ~jnp.isneginf(plan.weights())


def _pairs(plan, b, n, num_heads=N):
    """What a plan adds to each score of a head that counts, `{(i, j): weight}`, read literally."""

    def at(x):
        return None if x is None else np.asarray(x)[b % len(x), n * x.shape[1] // num_heads]

    added = {}
    (p, begin, end), blocks = map(at, plan.seen), at(plan.blocks)
    single = plan.columns and ops.PlanColumns(*map(at, plan.columns))
    for i in range(len(p)):
        m = i // plan.query_block
        entries = [
            (j, e, at(plan.log_weight))
            for e in range(at(plan.count)[m])
            for j in range(blocks[m, e] * plan.key_block, (blocks[m, e] + 1) * plan.key_block)
        ]
        if single is not None:
            entries += [(single.index[m, e], e, single.log_weight) for e in range(single.count[m])]
        for j, e, weight in entries:
            if j < len(begin) and _sees(p[i], begin[j], end[j]):
                assert (i, j) not in added
                added[i, j] = 0 if weight is None else weight[m, e]
    return added


def _literal(q, k, v, plan):
    """Outputs and log-sum-exps, query by query."""
    q, k, v = map(np.asarray, (q, k, v))
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b, n in np.ndindex(B, N):
        added = _pairs(plan, b, n)
        for i in range(T):
            keys = [j for j in range(S) if (i, j) in added]
            if keys:
                head = n * K // N
                x = k[b, keys, head] @ q[b, i, n] / np.sqrt(H) + [added[i, j] for j in keys]
                lse[b, i, n] = np.log(np.sum(np.exp(x)))
                out[b, i, n] = np.exp(x - lse[b, i, n]) @ v[b, keys, head]
    return out, lse


def _loss(out, lse):
    """Of outputs and log-sum-exps both."""
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(jnp.isneginf(lse), 0, lse)))


@functools.cache
def _values_and_gradients(implementation):
    attend = functools.partial(
        ops.block_sparse_attention, return_lse=True, implementation=implementation
    )

    @jax.jit
    def run(q, k, v, plan):
        values, pull = jax.vjp(lambda *x: attend(*x, plan), q, k, v)
        return values, pull(jax.grad(_loss, (0, 1))(*values))

    return run


@pytest.mark.parametrize("heads", [K, N])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_random_plans_are_what_they_say(heads, implementation):
    arrays, plan = _draw(), _random_plan(heads)
    values, gradients = _values_and_gradients(implementation)(*arrays, plan)
    for found, expected in zip(values, _literal(*arrays, plan), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert not np.any(values[0][:, :QUERY_BLOCK])
    assert np.all(np.isneginf(values[1][:, :QUERY_BLOCK]))
    assert not np.any(gradients[0][:, :QUERY_BLOCK])
    _, expected = _values_and_gradients("reference")(*arrays, plan)
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


def test_disjoint_plans_merge_to_their_union():
    q, k, v = _draw()
    whole = dataclasses.replace(_random_plan(K), columns=None)
    is_first = np.random.default_rng(2).random(whole.blocks.shape) < 0.5
    parts = []
    for part in (is_first, ~is_first):
        mine = part & np.asarray(whole.listed())
        order = np.argsort(~mine, axis=-1, kind="stable")
        blocks, weights = (
            np.take_along_axis(np.asarray(x), order, -1) for x in (whole.blocks, whole.log_weight)
        )
        count = mine.sum(axis=-1, dtype=np.int32)
        parts.append(
            dataclasses.replace(
                whole,
                blocks=jnp.asarray(blocks),
                count=jnp.asarray(count),
                log_weight=jnp.asarray(weights),
            )
        )

    @jax.jit
    def merged(q, k, v, parts):
        attend = functools.partial(ops.block_sparse_attention, return_lse=True)
        values, pull = jax.vjp(lambda *x: merge(*(attend(*x, part) for part in parts)), q, k, v)
        return values, pull(jax.grad(_loss, (0, 1))(*values))

    found = jax.tree.leaves(merged(q, k, v, parts))
    expected = jax.tree.leaves(_values_and_gradients("reference")(q, k, v, whole))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


def test_kinds_are_what_the_rule_says():
    plan = _random_plan(N, density=0.8)
    p, begin, end = _numpy(plan.seen)
    seen = _sees(p[..., None], begin[..., None, :], end[..., None, :])
    seen = np.pad(seen, ((0, 0), (0, 0), (0, -T % QUERY_BLOCK), (0, -S % KEY_BLOCK)))
    seen[..., T:, :] = seen[..., T - 1 : T, :]  # rows of no query do not make an entry partial
    tiles = seen.reshape(B, N, M, QUERY_BLOCK, BLOCKS, KEY_BLOCK).transpose(0, 1, 2, 4, 3, 5)
    tiles = np.take_along_axis(
        tiles.reshape(B, N, M, BLOCKS, -1), np.asarray(plan.blocks)[..., None] % BLOCKS, axis=3
    )
    kinds = np.asarray(_kinds(plan))
    listed = np.arange(BLOCKS) < np.asarray(plan.count)[..., None]
    assert np.all(kinds[~listed] == SKIPPED)
    assert not np.any(tiles[(kinds == SKIPPED) & listed])
    assert np.all(tiles[kinds == FULL])
    causal = ops.causal_plan(24, query_block=4, key_block=4)
    np.testing.assert_array_equal(_kinds(causal)[0, 0], np.eye(6) + 2 * np.tri(6, k=-1))
    block = jnp.repeat(jnp.arange(6, dtype=jnp.int32), 4)[None, None]
    others = dataclasses.replace(
        causal, blocks=jnp.tile(jnp.arange(6), (1, 1, 6, 1)), count=jnp.full((1, 1, 6), 6),
        seen=Visibility(block, block + 1, block),
    )  # fmt: skip
    np.testing.assert_array_equal(_kinds(others)[0, 0], 2 - np.eye(6))


def test_transposed_lists_hold_the_same_entries():
    plan = _random_plan(N)
    lists, plan = _numpy((_transposed(plan), plan))
    assert np.all(lists.start[..., -1] == plan.count.sum(axis=-1))
    for b, n in np.ndindex(B, N):
        for j in range(BLOCKS):
            entries = lists.entries[b, n, lists.start[b, n, j] : lists.start[b, n, j + 1]]
            readers = [m for m in range(M) if j in plan.blocks[b, n, m, : plan.count[b, n, m]]]
            assert list(entries // BLOCKS) == readers
            assert np.all(plan.blocks[b, n].reshape(-1)[entries] == j)


def test_density_counts_what_is_computed():
    plan = ops.causal_plan(1024)
    np.testing.assert_allclose(plan.density(), 36 * 128**2 / (1024 * 1025 / 2))
    few = dataclasses.replace(plan, count=jnp.ones_like(plan.count))
    np.testing.assert_allclose(few.density(causal=False), 1 / 8)


IDS = np.asarray(
    [[-1, 0, 0, 0, 0, 0, 2, 2, -1, 2, 2, 2, 2, 2, 3, 5, 5, 5, -1], [-1] * 19], np.int32
)


def _documents(causal=True):
    i = np.arange(IDS.shape[1])
    same = (IDS[:, :, None] == IDS[:, None]) & (IDS >= 0)[:, None]
    return same & (i[:, None] >= i) if causal else same


@pytest.mark.parametrize("causal", [True, False])
def test_documents(causal):
    build = functools.partial(
        ops.document_plan, causal=causal, longest=8, query_block=4, key_block=2
    )
    plan = jax.jit(build)(jnp.asarray(IDS))
    assert plan.blocks.shape[-1] == (6 if causal else 10)  # of 8 keys, or 15, for each of 4 queries
    np.testing.assert_array_equal(_mask(plan)[:, 0], _documents(causal))
    count = np.asarray(plan.count)
    assert count[0].sum() < 25  # of 50
    assert not np.any(count[1])


@pytest.mark.parametrize("packed", [False, True])
def test_windows_with_sinks(packed):
    length, windows, sinks = IDS.shape[1], (3, 6), 2
    ids = jnp.asarray(IDS) if packed else None
    build = functools.partial(
        ops.sliding_window_plan, length, windows, sinks=sinks, query_block=2, key_block=2
    )
    plan = jax.jit(build)(segment_ids=ids)
    assert plan.blocks.shape[-1] == 6  # 7 consecutive keys touch at most 4 blocks, sinks 2
    i = np.arange(length)
    documents = _documents() if packed else np.tri(length, dtype=bool)[None]
    first = np.argmax(documents, axis=-1)[..., None]
    for head, window in enumerate(windows):
        near = (i[:, None] - i < window) | (i - first < sinks)
        np.testing.assert_array_equal(_mask(plan)[:, head], documents & near)


def test_top_blocks_are_the_best_and_of_equals_the_first():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (1, 2, 6, 6)).astype(np.float32)  # many are equal
    scores[0, :, 5, 3] = np.nan, np.inf
    build = functools.partial(ops.top_blocks_plan, num_blocks=3, num_keys=22, query_block=4)
    plan = _numpy(jax.jit(functools.partial(build, key_block=4))(scores))
    for n, m in np.ndindex(2, 6):
        found = list(plan.blocks[0, n, m, : plan.count[0, n, m]])
        row = np.nan_to_num(np.asarray(scores[0, n, m]), nan=-1)
        others = sorted(range(1, m), key=lambda j: (-row[j], j))
        assert found == sorted({0, m, *others[: 3 - len({0, m})]})


def test_a_mask_of_blocks_and_the_last_queries():
    mask = np.random.default_rng(0).random((1, 1, 3, 5)) < 0.5
    build = functools.partial(ops.block_mask_plan, num_keys=19, query_block=4, key_block=4)
    plan = jax.jit(functools.partial(build, num_queries=10))(mask)
    expected = np.repeat(np.repeat(mask[0, 0], 4, axis=0), 4, axis=1)[:10, :19]
    np.testing.assert_array_equal(_mask(plan)[0, 0], expected & np.tri(10, 19, 9, dtype=bool))


def test_an_anchor_for_all_documents():
    """AnchorAttention (arXiv 2411.13476): the first token of the row, and the own document."""
    ids = jnp.asarray([[0] * 5 + [1] * 9])
    plan = ops.document_plan(ids, query_block=2, key_block=2)  # not traced: short lists
    assert plan.blocks.shape[-1] == 5
    end = np.array(plan.seen.end)
    end[..., 0] = NEVER
    seen = plan.seen._replace(end=end)
    is_far = np.asarray(plan.blocks)[..., 0] > 0
    anchors = ops.PlanColumns(np.zeros((*is_far.shape, 1), np.int32), is_far.astype(np.int32))
    plan = dataclasses.replace(plan, seen=seen, columns=anchors)
    i = np.arange(14)
    expected = (((i[:, None] < 5) == (i < 5)) | (i == 0)) & np.tri(14, dtype=bool)
    np.testing.assert_array_equal(_mask(plan)[0, 0], expected)
    assert sorted(_pairs(plan, 0, 0, 1)) == list(zip(*np.nonzero(expected), strict=True))


def test_memory_grows_with_the_lists_only():
    def gradient_memory(length):
        plan = jax.eval_shape(lambda: ops.sliding_window_plan(length, 256, query_block=64))
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = lambda *x: jnp.sum(ops.block_sparse_attention(*x))  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, plan).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert gradient_memory(8192) < 2.5 * gradient_memory(4096)


def _columns(index):
    return ops.PlanColumns(index, np.full(index.shape[:3], index.shape[3]))


def _broken(**changes):
    return dataclasses.replace(_random_plan(N), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_block": 0}, "plan.query_block: expected a whole number of at least 1"),
        ({"query_block": 8}, r"plan.blocks: expected \[b,h,m,e\] with .*'m': 3"),
        ({"blocks": np.zeros((B, 3, M, BLOCKS), int)}, "plan.blocks: .*got shape"),
        ({"blocks": np.zeros((B, N, M, BLOCKS), int)}, "plan.blocks: expected ids below 9 that"),
        ({"blocks": np.arange(BLOCKS) + np.full((B, N, M, 1), 2)}, "plan.blocks: expected ids"),
        ({"count": np.full((B, N, M), BLOCKS + 1)}, "plan.count: expected lengths of 0 to 9"),
        ({"count": np.zeros((B, N, M))}, "plan.count: expected an integer dtype"),
        ({"log_weight": np.full((B, N, M, BLOCKS), np.nan)}, "plan.log_weight: expected finite"),
        ({"columns": _columns(np.tile(np.arange(S), (B, N, M, 1)))}, "columns.index: .* outside"),
        ({"columns": _columns(np.zeros((B, N, M, 2), int))}, "columns.index: expected ids below"),
        ({"columns": _columns(np.zeros((B, N, 2, 2), int))}, "plan.columns.index: expected .*'m'"),
        ({"seen": Visibility(*(np.zeros((1, 1, 7), int),) * 3)}, "plan.seen.queries"),
    ],
)
def test_bad_plans(changes, message, no_type_hook):
    with pytest.raises(ValueError, match=message):
        lcattn.ops.block_sparse_attention(*_draw(), _broken(**changes))


def test_a_plan_may_be_a_constant_of_a_program():
    plan = _random_plan(K)
    out = jax.eval_shape(lambda *x: lcattn.ops.block_sparse_attention(*x, plan), *_draw())
    assert out.shape == (B, T, N, H)
    twice = dataclasses.replace(plan, blocks=jnp.zeros_like(plan.blocks))
    with pytest.raises(ValueError, match="ascend"):
        jax.eval_shape(lambda *x: lcattn.ops.block_sparse_attention(*x, twice), *_draw())


def test_a_plan_of_another_length_is_refused(no_type_hook):
    with pytest.raises(ValueError, match=r"plan\.seen\.queries"):
        lcattn.ops.block_sparse_attention(*_draw(), ops.causal_plan(40))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ops.causal_plan(4, num_queries=5), "num_queries: expected at most num_keys=4"),
        (lambda: ops.sliding_window_plan(4, 0), "window"),
        (lambda: ops.sliding_window_plan(4, 2, sinks=-1), "sinks"),
        (lambda: ops.top_blocks_plan(jnp.zeros((1, 1, 1, 1)), 1, 9), "num_blocks: expected at"),
        (lambda: ops.top_blocks_plan(jnp.zeros((1, 1, 2, 1)), 2, 9), "scores: expected shape"),
        (lambda: ops.block_mask_plan(jnp.ones((1, 1, 1, 2), bool), 9), "mask: expected shape"),
        (lambda: ops.document_plan(jnp.asarray([[1, 0]])), "segment_ids: expected ids that never"),
    ],
)
def test_bad_arguments_of_builders(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_tpu_takes_long_lists_in_turns(monkeypatch):
    """Rows one after another, then heads of keys, until the items of a turn fit."""
    plan, (q, k, v) = _random_plan(N), _draw()
    items = M * BLOCKS + BLOCKS  # of a head; each has a weight besides

    def turns(heads_that_fit):
        monkeypatch.setattr(mosaic_tpu, "MOST_ITEMS", 2 * items * heads_that_fit)
        return tpu_kernel._Turns.of(plan, K)

    assert turns(B * N) == (1, 1, B * N * items)
    assert turns(N) == (B, 1, N * items)
    assert turns(N - 1) == (B, K, N // K * items)
    assert turns(0) == (B, K, N // K * items)  # which is then objected to

    def at_once(q, k, v, plan, scale):
        return blockwise.attend(q, k, v, plan, scale=scale)

    in_turns = tpu_kernel._in_turns(tpu_kernel._in_turns(at_once, K, axis=1), B, axis=0)
    whole, parts = jax.jit(lambda *x: (at_once(*x, 0.5), in_turns(*x, 0.5)))(
        q, k, v, plan.cleared()
    )
    for x, y in zip(whole, parts, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)
