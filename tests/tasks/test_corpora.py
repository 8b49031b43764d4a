"""Corpora by name: our builders for real, published ones on tensorflow-datasets' mock data."""

import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lcattn.tasks import (
    CorpusConfig,
    DataConfig,
    Documents,
    MQARConfig,
    NGramModel,
    Records,
    TextFolderConfig,
    TextTaskConfig,
    check_batch,
)
from lcattn.tasks.tfds_builders import (
    LcattnMqar,
    LcattnTextFolder,
    MQARBuilderConfig,
    TextFolderBuilderConfig,
)

MQAR = MQARConfig(length=16, num_pairs=2, num_examples=300, vocab_size=64)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Both builders, built once: the MQAR rows, and a folder of text and other bytes."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.txt").write_bytes(b"\xff\xfe not UTF-8 \x00" * (i + 1))
    data_dir = tmp_path_factory.mktemp("tfds")
    mqar = MQARBuilderConfig(name="tiny", mqar=MQAR, num_test_examples=10)
    LcattnMqar(config=mqar, data_dir=data_dir).download_and_prepare()
    text = TextFolderConfig(path=str(folder), heldout_fraction=0.4)
    text = TextFolderBuilderConfig(name="tiny", folder=text)
    LcattnTextFolder(config=text, data_dir=data_dir).download_and_prepare()
    return str(data_dir), text.folder


def test_mqar_rows_come_back_from_disk(data_dir):
    records = tfds.data_source("lcattn_mqar/tiny", split="train", data_dir=data_dir[0])
    stored = Records(records, "lcattn_mqar/tiny:1.0.0/train")
    assert len(stored) == 300
    batch = next(DataConfig(batch_size=32, num_threads=0).make(stored))
    check_batch(batch, 64)
    expected = MQAR.make().batch(batch["example_ids"])  # rows are stored in another order
    for key, value in expected.items():
        np.testing.assert_array_equal(batch[key], value)
        assert batch[key].dtype == value.dtype
    test = tfds.data_source("lcattn_mqar/tiny", split="test", data_dir=data_dir[0])
    assert len(test) == 10


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_text_folder_comes_back_byte_for_byte(data_dir, split):
    path, folder = data_dir
    config = CorpusConfig(name="lcattn_text_folder/tiny", heldout_split="heldout", data_dir=path)
    stored, expected = config.make(split), folder.make(split)
    assert sorted(map(bytes, stored)) == sorted(map(bytes, expected))


def test_no_tensorflow(data_dir):
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(("name", "text_key"), [("lm1b", "text"), ("pg19", "book_text")])
def test_published_corpora_load_by_name(name, text_key, tmp_path):
    corpus = CorpusConfig(name=name, text_key=text_key, data_dir=str(tmp_path))
    with tfds.testing.mock_data(num_examples=20):
        documents = corpus.make("heldout")
        task = TextTaskConfig(corpus=corpus, length=16, data=DataConfig(batch_size=2)).make()
    assert isinstance(documents, Documents)
    assert len(documents) == 20
    check_batch(next(task.train()), task.vocab_size)
    assert NGramModel(task.train_documents, 2).bits_per_byte(task.heldout_documents) < 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "no_such_corpus"}, r"name: .*Dataset no_such_corpus not found.*'no_such_corpus'"),
        ({"name": "lcattn_text_folder/other"}, "name: .*BuilderConfig other not found"),
        ({"text_key": "body"}, r"text_key: expected one of the features \['path', 'text'\]"),
        ({"heldout_split": "test"}, "heldout_split: .*Unknown split 'test'.*, got 'test'"),
    ],
)
def test_wrong_fields_are_named_in_one_line(data_dir, fields, message):
    fields = {"name": "lcattn_text_folder/tiny", "data_dir": data_dir[0], **fields}
    with pytest.raises(ValueError, match=f"CorpusConfig.{message}") as error:
        CorpusConfig(**fields).make("heldout")
    assert "\n" not in str(error.value)


def test_a_corpus_in_a_format_that_needs_tensorflow_is_named(data_dir, tmp_path):
    shutil.copytree(data_dir[0], tmp_path, dirs_exist_ok=True)
    info = tmp_path / "lcattn_text_folder/tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    corpus = CorpusConfig(name="lcattn_text_folder/tiny", data_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"CorpusConfig.name: .*format array_record.*\['tfrecord'\]"
    ):
        corpus.make("train")


def test_a_corpus_that_is_not_prepared_says_what_to_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"'lm1b' is not prepared in .*download=True") as error:
        CorpusConfig(name="lm1b", data_dir=str(tmp_path)).make("train")
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def fail(self):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    corpus = CorpusConfig(name="lm1b", data_dir=str(tmp_path), download=True)
    with pytest.raises(RuntimeError, match=r"could not be downloaded.*: no route to host$"):
        corpus.make("train")


def test_a_split_of_another_name_is_refused():
    with pytest.raises(ValueError, match="split: expected 'train' or 'heldout', got 'test'"):
        CorpusConfig(name="lm1b").make("test")


@pytest.mark.parametrize("builder", [LcattnMqar, LcattnTextFolder])
def test_builders_need_a_config(builder, tmp_path):
    with pytest.raises(ValueError, match=f"{builder.__name__}.config: expected a builder config"):
        builder(data_dir=str(tmp_path))
