import numpy as np
import pytest

from lcattn.tasks import Documents, PackedText, check_batch, pack

SHAPES = [
    pytest.param([5], 8, id="one-shorter"),
    pytest.param([8], 8, id="one-exact"),
    pytest.param([9], 8, id="one-longer"),
    pytest.param([0, 3, 0, 0, 5, 1, 0], 8, id="empty-documents"),
    pytest.param([1] * 20, 7, id="ones"),
    pytest.param([1, 2, 3], 1, id="length-1"),
    pytest.param([100, 1, 63, 64, 65, 7, 127, 128, 129, 64, 20, 20, 24], 64, id="mixed"),
]


def _random_sizes(seed):
    rng = np.random.default_rng(seed)
    return rng.geometric(1 / rng.uniform(2, 90), size=150) - 1


SHAPES += [pytest.param(_random_sizes(seed), 32, id=f"random-{seed}") for seed in range(5)]


@pytest.mark.parametrize(("sizes", "length"), SHAPES)
def test_every_token_of_every_document_is_placed_once(sizes, length):
    plan = pack(np.array(sizes), length)
    taken = np.zeros((plan.num_rows, length), int)
    covered = [np.zeros(size, int) for size in sizes]
    for document, start, size, row, column in zip(
        plan.document, plan.start, plan.size, plan.row, plan.column, strict=True
    ):
        assert size > 0
        assert column + size <= length
        taken[row, column : column + size] += 1
        covered[document][start : start + size] += 1
    assert taken.max() == 1
    assert (taken.sum(axis=1) > 0).all()
    assert all((count == 1).all() for count in covered)


@pytest.mark.parametrize(("sizes", "length"), SHAPES)
def test_documents_are_cut_only_where_they_must(sizes, length):
    plan = pack(np.array(sizes), length)
    pieces = np.bincount(plan.document, minlength=len(sizes))
    np.testing.assert_array_equal(pieces, -(-np.array(sizes) // length))


def test_rows_are_nearly_full():
    sizes = _random_sizes(7).repeat(20)
    assert sizes.sum() / (pack(sizes, 256).num_rows * 256) > 0.99


def test_each_piece_goes_where_it_fits_best():
    plan = pack(np.array([6, 5, 3, 4]), 10)
    rows = dict(zip(plan.document.tolist(), plan.row.tolist(), strict=True))
    assert rows[0] == rows[3]  # 6 and 4 fill a row; first come, first served would take 6 and 3
    assert rows[1] == rows[2]


@pytest.mark.parametrize(("sizes", "length"), SHAPES)
def test_rows_give_the_documents_back(sizes, length):
    """Segments equal the pieces: targets are the bytes, tokens the bytes before them."""
    rng = np.random.default_rng(0)
    documents = Documents([rng.bytes(size) for size in sizes])
    text = PackedText(documents, length)
    if not len(text):
        return
    indices = rng.permutation(len(text))
    batch = text.batch(indices)
    check_batch(batch, 257)
    rebuilt = {document: {} for document in range(len(sizes))}
    for place, row in enumerate(indices):
        pieces = np.nonzero(text.packing.row == row)[0]
        segments = batch["segment_ids"][place]
        assert segments.max() + 1 == len(pieces)
        for segment, piece in enumerate(pieces):
            document, start = text.packing.document[piece], text.packing.start[piece]
            whole = np.concatenate([[256], documents[document]])
            inside = segments == segment
            size = inside.sum()
            np.testing.assert_array_equal(
                batch["tokens"][place][inside], whole[start : start + size]
            )
            rebuilt[document][start] = bytes(batch["targets"][place][inside].astype(np.uint8))
    for document, pieces in rebuilt.items():
        assert b"".join(pieces[start] for start in sorted(pieces)) == bytes(documents[document])
    np.testing.assert_array_equal(batch["weights"], batch["segment_ids"] >= 0)
    assert batch["weights"].sum() == sum(sizes)
    np.testing.assert_array_equal(batch["example_ids"], indices)


def test_a_picture_of_two_rows():
    text = PackedText(Documents(["abcde", "fg", "h"]), 4)
    batch = text.batch(np.arange(2))
    a, b, c, d, e, f, g, h = range(97, 105)
    assert batch["tokens"].tolist() == [[256, a, b, c], [256, f, d, 256]]
    assert batch["targets"].tolist() == [[a, b, c, d], [f, g, e, h]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 1, 2]]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="length: expected a positive number of tokens, got 0"):
        pack(np.array([3]), 0)
    with pytest.raises(ValueError, match=r"indices: .*\[0, 1\), got 0\.\.1"):
        PackedText(Documents(["abc"]), 8).batch(np.array([0, 1]))


def test_fingerprints_tell_lengths_and_texts_apart():
    texts = [PackedText(Documents([text]), n) for text in ("abc", "abd") for n in (4, 5)]
    assert len({text.fingerprint for text in texts}) == 4
