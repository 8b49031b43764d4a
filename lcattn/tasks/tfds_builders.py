"""Builders of tensorflow-datasets: build a data set once, read it with random access.

Files are `array_record`, which is written and read without TensorFlow. Importing this module
imports tensorflow-datasets, so `lcattn.tasks` does not import it::

    from lcattn.tasks.tfds_builders import LcattnMqar, MQARBuilderConfig

    config = MQARBuilderConfig(name="length_64_pairs_4", mqar=MQARConfig(length=64, num_pairs=4))
    LcattnMqar(config=config, data_dir=...).download_and_prepare()
    tfds.data_source("lcattn_mqar/length_64_pairs_4", split="train", data_dir=...)
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lcattn.errors import argument_error
from lcattn.tasks.mqar import MQARConfig
from lcattn.tasks.text import TextFolderConfig

type _Examples = Iterator[tuple[Any, dict[str, Any]]]


class _ArrayRecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Stores `array_record`, and gives every split its own generator."""

    def __init__(self, *, config: Any = None, file_format: str = "array_record", **kwargs: Any):
        if config is None:
            raise argument_error(f"{type(self).__name__}.config", "a builder config", None)
        super().__init__(config=config, file_format=file_format, **kwargs)

    def _generate_examples(self, *args: Any, **kwargs: Any) -> _Examples:
        raise NotImplementedError("the splits bring their own generators")


@dataclasses.dataclass(kw_only=True)
class MQARBuilderConfig(tfds.core.BuilderConfig):
    """A named MQAR data set.

    Attributes:
      mqar: the training rows.
      num_test_examples: rows of the split `test`.
    """

    mqar: MQARConfig
    num_test_examples: int = 1000


class LcattnMqar(_ArrayRecordBuilder):
    """Rows of associative recall, as batches hold them; `lcattn.tasks.Records` reads them."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: MQARBuilderConfig

    def _info(self) -> tfds.core.DatasetInfo:
        row = (self.builder_config.mqar.length,)
        features = {
            "tokens": tfds.features.Tensor(shape=row, dtype=np.int32),
            "targets": tfds.features.Tensor(shape=row, dtype=np.int32),
            "weights": tfds.features.Tensor(shape=row, dtype=np.float32),
            "example_ids": tfds.features.Scalar(dtype=np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Multi-query associative recall (arXiv:2312.04927).",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        config = self.builder_config
        test = config.mqar.replace(num_examples=config.num_test_examples)
        return {"train": _rows(config.mqar, "train"), "test": _rows(test, "test")}


def _rows(config: MQARConfig, split: str) -> _Examples:
    source = config.make(split)
    for first in range(0, len(source), 256):
        batch = source.batch(np.arange(first, min(first + 256, len(source))))
        for row, index in enumerate(batch["example_ids"].tolist()):
            yield index, {key: array[row] for key, array in batch.items()}


@dataclasses.dataclass(kw_only=True)
class TextFolderBuilderConfig(tfds.core.BuilderConfig):
    """A named folder of text files.

    Attributes:
      folder: which files, and how they are split.
    """

    folder: TextFolderConfig


class LcattnTextFolder(_ArrayRecordBuilder):
    """A document a file, with its path; `lcattn.tasks.CorpusConfig` reads them by name."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: TextFolderBuilderConfig

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "path": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="A folder of text files, whole files held out.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        folder = self.builder_config.folder
        return {split: _files(folder, split) for split in ("train", "heldout")}


def _files(folder: TextFolderConfig, split: str) -> _Examples:
    documents = folder.make(split)
    for path, data in zip(documents.names, documents, strict=True):
        yield path, {"text": data.tobytes(), "path": path}
