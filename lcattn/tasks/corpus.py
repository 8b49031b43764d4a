"""Text corpora by name, through tensorflow-datasets (which does without TensorFlow)."""

import dataclasses
from typing import Any

from lcattn.config import Config
from lcattn.errors import argument_error
from lcattn.tasks.text import Documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig(Config):
    """A text corpus that tensorflow-datasets knows, such as `lm1b` or `pg19`, or one built by us.

    The corpus must have been prepared as `array_record`, the format that is read without
    TensorFlow; `download=True` does so where there is a network. Documents are kept in memory.

    Attributes:
      name: of the data set, e.g. "lm1b" or "wikipedia/20230601.en".
      train_split: split to train on; slices are understood, e.g. "train[:10%]".
      heldout_split: split to evaluate on.
      text_key: which feature is the text ("text" in lm1b, "book_text" in pg19).
      data_dir: where data sets are kept. None: `~/tensorflow_datasets`.
      download: download and prepare the corpus if that was not done yet.
    """

    name: str
    train_split: str = "train"
    heldout_split: str = "test"
    text_key: str = "text"
    data_dir: str | None = None
    download: bool = False

    def make(self, split: str) -> Documents:
        """Reads the documents of one split, `"train"` or `"heldout"`.

        Raises:
          ValueError: if tensorflow-datasets does not know the name, the split or the feature, or
            the corpus was prepared in another file format.
          RuntimeError: if the corpus is not prepared, or could not be downloaded.
        """
        import tensorflow_datasets as tfds  # takes a second; only corpora need it

        if split not in ("train", "heldout"):
            raise argument_error("split", "'train' or 'heldout'", repr(split))
        try:
            builder = tfds.builder(self.name, data_dir=self.data_dir, file_format="array_record")
        except ValueError as error:
            known = f"a data set that tensorflow-datasets knows or has in {self.data_dir!r}"
            raise self.error("name", f"{known} ({_first_line(error)})") from None
        if self.text_key not in builder.info.features:
            raise self.error("text_key", f"one of the features {sorted(builder.info.features)}")
        if self.download:
            _download(builder)
        field = f"{split}_split"
        try:
            records: Any = builder.as_data_source(split=getattr(self, field))
        except KeyError:  # what tensorflow-datasets raises where no split was generated
            raise RuntimeError(
                f"corpus {self.name!r} is not prepared in {builder.data_dir}; where there is a "
                f"network, run: from lcattn.tasks import CorpusConfig; "
                f"CorpusConfig(name={self.name!r}, data_dir={self.data_dir!r}, "
                f"text_key={self.text_key!r}, download=True).make('train')"
            ) from None
        except ValueError as error:
            raise self.error(field, f"a split of {self.name!r} ({_first_line(error)})") from None
        return Documents(record[self.text_key] for record in records)


def _download(builder: Any) -> None:
    try:
        builder.download_and_prepare()
    # A download fails in as many ways as there are servers and file formats: the user gets one
    # line, the developer the cause.
    except Exception as error:
        raise RuntimeError(
            f"corpus {builder.name!r} could not be downloaded and prepared in {builder.data_dir}: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
