import sys
import warnings

import numpy as np
import pytest

from lcattn.tasks import ByteTokenizer, Documents, TextFolderConfig, standard_library


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"text {i}\n".encode() * (i + 1))
    return tmp_path


def test_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve ∑")
    assert ids[0] == tokenizer.bos == 256
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == "naïve ∑"
    np.testing.assert_array_equal(tokenizer.encode(b"\xff\x00", bos=False), [255, 0])
    assert tokenizer.decode([255, 65, 256]) == "�A"


def test_documents_are_a_sequence():
    documents = Documents([b"ab", "ç", b""])
    assert [bytes(d) for d in documents] == [b"ab", b"\xc3\xa7", b""]
    assert bytes(documents[-2]) == b"\xc3\xa7"
    assert [bytes(d) for d in documents[:1]] == [b"ab"]
    with pytest.raises(IndexError, match="document 3 of 3"):
        documents[3]
    with pytest.raises(ValueError, match="names: expected 1 names, got 2"):
        Documents(["a"], names=["x", "y"])
    assert documents.fingerprint != Documents([b"ab", "d", b""]).fingerprint
    assert Documents([b"ab", b"c"]).fingerprint != Documents([b"a", b"bc"]).fingerprint


def test_splits_are_disjoint_cover_the_folder_and_do_not_depend_on_other_files(folder):
    config = TextFolderConfig(path=str(folder), heldout_fraction=0.3)
    train, heldout = config.make("train"), config.make("heldout")
    assert set(train.names).isdisjoint(heldout.names)
    assert len(train) + len(heldout) == 40
    assert 3 <= len(heldout) <= 25
    assert bytes(train[0]) == (folder / train.names[0]).read_bytes()
    assert list(train.names) == sorted(train.names)

    for name in train.names[::2]:
        (folder / name).unlink()
    assert config.make("heldout").names == heldout.names
    assert config.replace(seed=1).make("heldout").names != heldout.names


def test_patterns_select_and_exclude(folder):
    (folder / "part0" / "notes.md").write_text("a note")
    config = TextFolderConfig(
        path=str(folder), pattern="**/*.txt", exclude=("part1/*", "*/3.txt"), heldout_fraction=0.5
    )
    names = {*config.make("train").names, *config.make("heldout").names}
    assert not any(name.startswith("part1/") or name.endswith(".md") for name in names)
    assert "part0/3.txt" not in names
    assert "part0/0.txt" in names


def test_bytes_mode_takes_any_file_and_text_mode_names_what_it_leaves_out(folder):
    for i in range(7):
        (folder / f"bad{i}.txt").write_bytes(b"\xff\xfe\x00")
    config = TextFolderConfig(path=str(folder), heldout_fraction=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = config.make("train").names + config.make("heldout").names
    assert len(names) == 47

    kept = []
    for split in ("train", "heldout"):
        with pytest.warns(UserWarning, match=r"\d of \d+ files are not valid utf-8.*bad\d\.txt"):
            kept += config.replace(encoding="utf-8").make(split).names
    assert len(kept) == 40
    assert not any("bad" in name for name in kept)


def test_bad_folders_are_refused(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match=r"TextFolderConfig.path: expected an existing folder"):
        TextFolderConfig(path=str(folder / "absent")).make("train")
    with pytest.raises(ValueError, match=r"TextFolderConfig.path: expected a folder with files"):
        TextFolderConfig(path=str(empty)).make("train")
    (empty / "blank").write_bytes(b"")
    with pytest.raises(ValueError, match=r"some text in the 'train' split .* none in 1 of 1 files"):
        TextFolderConfig(path=str(empty), heldout_fraction=1e-9).make("train")
    (empty / "blank").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"'heldout' split .* none in 0 of 1 files"):
        TextFolderConfig(path=str(empty), heldout_fraction=1e-9).make("heldout")
    with pytest.raises(ValueError, match="split: expected 'train' or 'heldout', got 'test'"):
        TextFolderConfig(path=str(folder)).make("test")


@pytest.mark.parametrize(
    ("field", "value"),
    [("heldout_fraction", 0.0), ("heldout_fraction", 1.0), ("encoding", "utf-88"), ("pattern", "")],
)
def test_wrong_fields_are_named(folder, field, value):
    with pytest.raises(ValueError, match=f"TextFolderConfig.{field}: expected .*, got {value!r}"):
        TextFolderConfig(path=str(folder), **{field: value})


def test_the_standard_library_is_found():
    config = standard_library()
    names = {*config.make("train").names, *config.make("heldout").names}
    assert {"dataclasses.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert len(names) > 300, sys.version
