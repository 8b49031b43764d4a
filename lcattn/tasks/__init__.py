"""Data: tasks, corpora, and the way from rows to batches.

- tasks a script trains on: `MQARTaskConfig`, `NeedleTaskConfig`, `TextTaskConfig`,
  `ExtrapolationTaskConfig` (each makes a `Task`);
- rows: `MQARConfig`, `NeedleConfig`, `PasskeyConfig` (computed), `PackedText` (of `Documents`),
  `Records` (stored one by one);
- text: `TextFolderConfig`, `standard_library`, `CorpusConfig` (by name), `ByteTokenizer`;
- batches: `DataConfig`, `Batches`, `BatchIterator`, `check_batch`, `mask_prefix`;
- drawn on the device, for `lcattn.training.train_seeds`: `RepeatedTokensConfig`,
  `repeated_tokens`, `ItemLabelConfig`;
- a baseline, a metric and a prompt: `NGramModel`, `accuracy`, `repeat_prompt`.

In-context regression, drawn on the device from a key, is in `lcattn.tasks.regression`.
Builders of tensorflow-datasets are in `lcattn.tasks.tfds_builders`, which is imported on demand.
"""

from lcattn.tasks.batch import Batch, check_batch
from lcattn.tasks.corpus import CorpusConfig
from lcattn.tasks.extrapolation import ExtrapolationTask, ExtrapolationTaskConfig
from lcattn.tasks.item_label import ItemLabelConfig
from lcattn.tasks.metrics import accuracy
from lcattn.tasks.mqar import MQAR, PAPER_TEST, PAPER_TRAIN, MQARConfig
from lcattn.tasks.needle import NeedleConfig
from lcattn.tasks.ngram import NGramModel
from lcattn.tasks.packing import PackedText, Packing, pack
from lcattn.tasks.passkey import PasskeyConfig
from lcattn.tasks.pipeline import Batches, BatchIterator, DataConfig, Records, Source
from lcattn.tasks.prefix import mask_prefix, repeat_prompt
from lcattn.tasks.repeated import RepeatedTokensConfig, repeated_tokens
from lcattn.tasks.retrieval import NeedleTask, NeedleTaskConfig
from lcattn.tasks.task import MQARTask, MQARTaskConfig, Task, TextTask, TextTaskConfig
from lcattn.tasks.text import ByteTokenizer, Documents, TextFolderConfig, standard_library

__all__ = [
    "MQAR",
    "PAPER_TEST",
    "PAPER_TRAIN",
    "Batch",
    "BatchIterator",
    "Batches",
    "ByteTokenizer",
    "CorpusConfig",
    "DataConfig",
    "Documents",
    "ExtrapolationTask",
    "ExtrapolationTaskConfig",
    "ItemLabelConfig",
    "MQARConfig",
    "MQARTask",
    "MQARTaskConfig",
    "NGramModel",
    "NeedleConfig",
    "NeedleTask",
    "NeedleTaskConfig",
    "PackedText",
    "Packing",
    "PasskeyConfig",
    "Records",
    "RepeatedTokensConfig",
    "Source",
    "Task",
    "TextFolderConfig",
    "TextTask",
    "TextTaskConfig",
    "accuracy",
    "check_batch",
    "mask_prefix",
    "pack",
    "repeat_prompt",
    "repeated_tokens",
    "standard_library",
]
