import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from lcattn.tasks import DataConfig, MQARConfig, Records, check_batch

SMALL = MQARConfig(length=16, num_pairs=2, num_examples=50, vocab_size=64)
OTHER = MQARConfig(length=32, num_pairs=2, num_examples=23, vocab_size=64)
DATA = DataConfig(batch_size=8, seed=3, num_epochs=1)


def _ids(batches):
    return [batch["example_ids"].tolist() for batch in batches]


def _flat(batches):
    return np.concatenate([batch["example_ids"] for batch in batches])


def test_a_pass_shuffles_and_takes_each_row_at_most_once():
    ids = _flat(DATA.batches(SMALL.make()))
    assert len(set(ids)) == len(ids) == 48
    assert not np.array_equal(ids, np.arange(48))
    ordered = _flat(DATA.replace(shuffle=False).batches(SMALL.make()))
    np.testing.assert_array_equal(ordered, np.arange(48))


def test_each_pass_has_its_own_order_and_each_seed_too():
    first, second, other = (
        _flat(list(DATA.replace(num_epochs=2).batches(SMALL.make()))[6 * i : 6 * i + 6])
        for i in (0, 1, 0)
    )
    np.testing.assert_array_equal(first, other)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, _flat(DATA.replace(seed=4).batches(SMALL.make())))


def test_rows_are_those_of_the_source():
    source = SMALL.make()
    for batch in DATA.batches(source):
        expected = source.batch(batch["example_ids"])
        np.testing.assert_array_equal(batch["tokens"], expected["tokens"])


def test_the_last_batch_is_completed_with_rows_of_no_weight():
    data = DATA.replace(drop_remainder=False, shuffle=False)
    batches = data.batches(SMALL.make())
    assert len(batches) == 7
    last = batches[-1]
    check_batch(last, 64)
    assert last["tokens"].shape == (8, 16)
    assert last["example_ids"].tolist() == [48, 49, -1, -1, -1, -1, -1, -1]
    assert (last["weights"].sum(axis=1) > 0).tolist() == [True] * 2 + [False] * 6
    assert sorted(i for i in _flat(batches) if i >= 0) == list(range(50))
    assert last["weights"].dtype == np.float32
    assert last["targets"].dtype == np.int32


def test_a_mixture_keeps_each_batch_to_one_length():
    batches = DATA.batches(SMALL.make(), OTHER.make())
    assert len(batches) == 50 // 8 + 23 // 8
    lengths = [batch["tokens"].shape[1] for batch in batches]
    assert sorted(lengths) == [16] * 6 + [32] * 2
    for batch in batches:
        is_other = batch["tokens"].shape[1] == 32
        ids = batch["example_ids"]
        assert ((ids >= 50) == is_other).all()  # ids count through all sources
        source = OTHER.make() if is_other else SMALL.make()
        np.testing.assert_array_equal(batch["tokens"], source.batch(ids - 50 * is_other)["tokens"])
    ordered = DATA.replace(shuffle=False).batches(SMALL.make(), OTHER.make())
    assert [batch["tokens"].shape[1] for batch in ordered] == [16] * 6 + [32] * 2


@pytest.mark.parametrize("drop_remainder", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_shards_are_slices_of_the_global_batch(count, drop_remainder):
    data = DATA.replace(drop_remainder=drop_remainder)
    whole = data.batches(SMALL.make(), OTHER.make())
    shards = [
        data.replace(shard_index=i, shard_count=count).batches(SMALL.make(), OTHER.make())
        for i in range(count)
    ]
    for batch, *parts in zip(whole, *shards, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([p[key] for p in parts]))
    assert {shard.fingerprint for shard in shards} == {whole.fingerprint}


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_an_iterator_gives_the_batches_in_order_and_ends(num_threads):
    data = DATA.replace(num_threads=num_threads, num_epochs=2)
    iterator = data.make(SMALL.make())
    assert _ids(iterator) == _ids(data.batches(SMALL.make()))
    with pytest.raises(StopIteration):
        next(iterator)
    iterator.close()


def test_without_an_end_it_goes_on():
    iterator = DATA.replace(num_epochs=None).make(SMALL.make())
    assert len({tuple(next(iterator)["example_ids"]) for _ in range(20)}) == 20
    iterator.close()


@pytest.mark.parametrize("step", [0, 1, 5, 6, 9])
def test_resuming_continues_bit_for_bit(step):
    data = DATA.replace(num_epochs=2)
    iterator = data.make(SMALL.make(), OTHER.make())
    for _ in range(step):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(4)]

    # A fresh iterator, and one that is already somewhere else; other threads do not matter.
    for threads, ahead in ((1, 0), (0, 3)):
        resumed = data.replace(num_threads=threads).make(SMALL.make(), OTHER.make())
        for _ in range(ahead):
            next(resumed)
        resumed.set_state(state)
        assert resumed.get_state() == state
        for batch in expected:
            for key, value in next(resumed).items():
                np.testing.assert_array_equal(value, batch[key])


def test_resuming_in_a_fresh_process():
    program = """
import json, sys
from lcattn.tasks import DataConfig, MQARConfig
source = MQARConfig(length=16, num_pairs=2, num_examples=50, vocab_size=64).make()
iterator = DataConfig(batch_size=8, seed=3).make(source)
iterator.set_state(json.loads(sys.argv[1]))
print(json.dumps([next(iterator)["tokens"].tolist() for _ in range(3)]))
"""
    iterator = DataConfig(batch_size=8, seed=3).make(SMALL.make())
    for _ in range(8):  # into the second pass
        next(iterator)
    state = json.dumps(iterator.get_state())
    result = subprocess.run(
        [sys.executable, "-c", program, state], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == [next(iterator)["tokens"].tolist() for _ in range(3)]


def test_a_state_of_other_data_is_refused():
    state = DATA.make(SMALL.make()).get_state()
    others = [
        DATA.make(SMALL.replace(seed=1).make()),
        DATA.make(SMALL.make("test")),
        DATA.make(SMALL.make(), OTHER.make()),
        DATA.replace(batch_size=4).make(SMALL.make()),
        DATA.replace(seed=1).make(SMALL.make()),
        DATA.replace(shuffle=False).make(SMALL.make()),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"state\['data'\]: expected .*fingerprint"):
            other.set_state(state)


@pytest.mark.parametrize("step", [-1, 7, "2", None, True])
def test_a_damaged_state_is_refused(step):
    iterator = DATA.make(SMALL.make())
    state = {**iterator.get_state(), "next_batch": step}
    with pytest.raises(ValueError, match=r"state\['next_batch'\]: expected an int in \[0, 6\]"):
        iterator.set_state(state)


def test_batches_can_be_made_from_many_threads():
    batches = DATA.batches(SMALL.make())
    expected, got = _ids(batches), [None] * len(batches)

    def work(offset):
        for step in range(30):
            index = (step + offset) % len(batches)
            got[index] = batches[index]["example_ids"].tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_batches_are_a_sequence():
    batches = DATA.batches(SMALL.make())
    assert _ids(batches[1:4]) == _ids(batches)[1:4]
    assert len(batches[:100]) == 6
    with pytest.raises(IndexError, match="batch 6 of 6"):
        batches[6]
    assert _ids(batches) == _ids(batches)


def test_stored_records_are_a_source():
    source = SMALL.make()
    rows = [
        {key: value[0] for key, value in source.batch(np.array([i])).items()} for i in range(50)
    ]
    stored = DATA.batches(Records(rows, "small"))
    for batch, expected in zip(stored, DATA.batches(source), strict=True):
        check_batch(batch, 64)
        for key in batch:
            np.testing.assert_array_equal(batch[key], expected[key])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shard_index": 2, "shard_count": 2}, r"shard_index: expected a value in \[0, 2\), got 2"),
        ({"shard_index": -1, "shard_count": 2}, r"shard_index: expected a value in \[0, 2\)"),
        ({"shard_index": 0, "shard_count": 3}, "batch_size: .*multiple of shard_count = 3, got 8"),
        ({"shard_index": 0, "shard_count": 0}, "shard_count: .*greater than 0, got 0"),
        ({"shard_index": 0}, "shard_index: expected both shard_index and shard_count, or neither"),
        ({"batch_size": 0}, "batch_size: .*greater than 0"),
        ({"num_epochs": 0}, "num_epochs: .*greater than 0"),
        ({"seed": 2**32}, "seed: "),
        ({"num_threads": -1}, "num_threads: expected a value of at least 0"),
        ({"prefetch": 0}, "prefetch: "),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=f"DataConfig.{message}"):
        DATA.replace(**fields)


def test_sources_that_give_no_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size: expected at most the 50 rows of the data"):
        DATA.replace(batch_size=51).batches(SMALL.make())
    with pytest.raises(ValueError, match="sources: expected at least one data set"):
        DATA.batches()
