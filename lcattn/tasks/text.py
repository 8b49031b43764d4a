"""Text as bytes: the tokenizer, documents in memory, and folders of files as a corpus."""

import codecs
import dataclasses
import fnmatch
import functools
import hashlib
import operator
import pathlib
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from typing import SupportsIndex, overload, override

import numpy as np

from lcattn.config import Config
from lcattn.errors import argument_error


class ByteTokenizer:
    """Token i is byte i; token 256 (`bos`) opens a document.

    Any file can be encoded and nothing is unknown, and since each byte of a document is predicted
    exactly once, the first one from `bos`, the mean loss is the text's compressed size: bits per
    byte, which compares across models and with count models. The end of a document is not
    predicted, since that would charge the model for bits that belong to no byte.
    """

    bos = 256
    vocab_size = 257

    def encode(self, text: str | bytes, bos: bool = True) -> np.ndarray:
        """The token ids of a text, [T] int32, opened by `bos` unless told otherwise."""
        data = text.encode() if isinstance(text, str) else text
        ids = np.frombuffer(data, np.uint8).astype(np.int32)
        return np.concatenate([np.array([self.bos], np.int32), ids]) if bos else ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of token ids. `bos` is left out; broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in map(operator.index, ids) if i != self.bos).decode(errors="replace")


class Documents(Sequence[np.ndarray]):
    """Documents as bytes in memory: one array of all bytes, and where each document begins.

    One byte of memory a byte of text: 10 GB of text fit on a training host. For more, take a slice
    of a corpus (`CorpusConfig.train_split="train[:10%]"`).

    Attributes:
      data: [total bytes] uint8.
      offsets: [documents + 1] int64; document i is `data[offsets[i] : offsets[i + 1]]`.
      names: one name a document, for error messages.
    """

    def __init__(self, texts: Iterable[str | bytes], names: Sequence[str] | None = None):
        encoded = [text.encode() if isinstance(text, str) else text for text in texts]
        self.data = np.frombuffer(b"".join(encoded), np.uint8)
        self.offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self.names = tuple(map(str, range(len(encoded)))) if names is None else tuple(names)
        if len(self.names) != len(self):
            raise argument_error("names", f"{len(self)} names", f"{len(self.names)}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: SupportsIndex) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"document {position} of {len(self)}")
        position %= len(self)
        return self.data[self.offsets[position] : self.offsets[position + 1]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for equal bytes cut into equal documents."""
        digest = hashlib.sha256(self.offsets.tobytes())
        digest.update(self.data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFolderConfig(Config):
    """Every file of a folder is a document; whole files are held out.

    A file is held out if a hash of its path within the folder, and of the seed, says so. So the
    split depends neither on the order in which the files are found nor on the other files: adding
    one never moves another from the training text to the held-out text.

    Attributes:
      path: the folder.
      pattern: glob pattern of the files within it; `**` stands for any folders between.
      exclude: patterns of paths within the folder to leave out, as of `fnmatch`: here `*` matches
        across `/`.
      heldout_fraction: expected share of the files that are held out.
      seed: of the split.
      encoding: None takes any bytes as text. With a name, such as "utf-8", files that are not
        valid in this encoding are left out, with a warning that counts and names them.
    """

    path: str
    pattern: str = "**/*"
    exclude: tuple[str, ...] = ()
    heldout_fraction: float = 0.1
    seed: int = 0
    encoding: str | None = None

    @override
    def validate(self) -> None:
        if not 0 < self.heldout_fraction < 1:
            raise self.error("heldout_fraction", "a value between 0 and 1")
        if not self.pattern or pathlib.PurePath(self.pattern).is_absolute():
            raise self.error("pattern", "a glob pattern relative to the folder")
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise self.error("encoding", "None or the name of a text encoding") from None

    def make(self, split: str) -> Documents:
        """Reads the documents of one split, `"train"` or `"heldout"`, in the order of their paths.

        Raises:
          ValueError: if the folder does not exist, or the split holds no text.
        """
        if split not in ("train", "heldout"):
            raise argument_error("split", "'train' or 'heldout'", repr(split))
        paths = self._paths()
        if not paths:
            raise self.error("path", f"a folder with files that match {self.pattern!r}")
        chosen = [path for path in paths if self._is_heldout(path) == (split == "heldout")]
        texts = {path: (pathlib.Path(self.path) / path).read_bytes() for path in chosen}
        if self.encoding is not None:
            texts = _decodable(texts, self.encoding)
        documents = Documents(texts.values(), tuple(texts))
        if not documents.data.size:
            raise argument_error(
                "TextFolderConfig",
                f"some text in the {split!r} split of {self.path!r}",
                f"none in {len(chosen)} of {len(paths)} files "
                f"(heldout_fraction={self.heldout_fraction}, seed={self.seed})",
            )
        return documents

    def _paths(self) -> list[str]:
        root = pathlib.Path(self.path)
        if not root.is_dir():
            raise self.error("path", "an existing folder")
        paths = (p.relative_to(root).as_posix() for p in root.glob(self.pattern) if p.is_file())
        return sorted(p for p in paths if not any(fnmatch.fnmatchcase(p, e) for e in self.exclude))

    def _is_heldout(self, path: str) -> bool:
        digest = hashlib.sha256(f"{self.seed}:{path}".encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:8]) < self.heldout_fraction * 2**64


def standard_library() -> TextFolderConfig:
    """The source files of the running Python's own standard library: text on every machine.

    About 11 MB in 690 files. Installed packages and the library's own tests are left out.
    """
    return TextFolderConfig(
        path=sysconfig.get_paths()["stdlib"],
        pattern="**/*.py",
        exclude=(
            "site-packages/*",
            "dist-packages/*",
            "test/*",
            "*/test/*",
            "*/tests/*",
            "*/idle_test/*",
        ),
    )


def _decodable(texts: dict[str, bytes], encoding: str) -> dict[str, bytes]:
    bad = [path for path, data in texts.items() if not _is_valid(data, encoding)]
    if bad:
        named = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        warnings.warn(
            f"{len(bad)} of {len(texts)} files are not valid {encoding} and were left out: {named}",
            stacklevel=3,
        )
    return {path: data for path, data in texts.items() if path not in set(bad)}


def _is_valid(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
