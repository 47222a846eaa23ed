"""What an archive says about itself: its description, and the points up to which it is committed and finished.

The manifest is one small JSON file that is replaced whole: replacing it is the act of committing. What is committed
segment by segment stands in a journal beside it, a line a segment, of which the manifest names the length and the
digest. Both are read strictly: a manifest that differs from what was written, in any byte, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from reprlib import repr as short  # of a stranger's value: never long
from typing import Any, Self, TypeVar, get_type_hints

from drt.errors import DRTError
from drt.files import read_bytes

T = TypeVar("T")
_types_of: Callable[[type], dict[str, type]] = cache(
    get_type_hints
)  # a journal has a part for every document

FORMAT = "drt-archive"
FORMAT_VERSION = 1
DATA_FILES = ("chunks.bin", "landmarks.bin", "index.bin", "text.bin")
MAX_BYTES = 2**20  # of a manifest
MAX_SIZE = 2**28  # of what is allocated for a chunk or a pass; no model comes near
MAX_COUNT = (
    2**53
)  # of chunks or bytes: their sums and products with sizes fit 64 bits, or files that do not exist


@dataclass(frozen=True)
class ArchiveDescription:
    """What an archive was made by and how it holds chunks; fixed for its lifetime.

    Args:
        model_name: of the model, for people.
        model_fingerprint: of the model that made it; only that one can read it.
        tokenizer_fingerprint: of its tokenizer.
        chunk_size: tokens S of a full chunk.
        num_heads: key/value heads h_kv of a chunk.
        head_dim: their width D.
        landmark_size: width H of a landmark.
        segment_size: tokens of a pass that reads a text; a build can only be resumed with the same.
        dtype: of keys and values: "bfloat16", "float32", "float16" or "int8".
        landmark_dtype: "float32" or "bfloat16".
    """

    model_name: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    chunk_size: int
    num_heads: int
    head_dim: int
    landmark_size: int
    segment_size: int
    dtype: str = "bfloat16"
    landmark_dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = ("chunk_size", "num_heads", "head_dim", "landmark_size", "segment_size")
        for name in sizes:
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                raise ValueError(f"{name} must be 1 to {MAX_SIZE}, got {getattr(self, name)}")
        numbers = 2 * self.chunk_size * self.num_heads * self.head_dim
        if numbers > MAX_SIZE:
            raise ValueError(f"a chunk must hold at most {MAX_SIZE} numbers, got {numbers}")
        if self.dtype not in ("bfloat16", "float32", "float16", "int8"):
            raise ValueError(f"dtype must be bfloat16, float32, float16 or int8, got {self.dtype!r}")
        if self.landmark_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"landmark_dtype must be float32 or bfloat16, got {self.landmark_dtype!r}")


@dataclass(frozen=True)
class Point:
    """A moment in an archive's growth: how much of each file belongs to it.

    Args:
        segments: lines of the journal.
        journal_bytes: their length.
        journal_sha256: their digest.
        chunks: chunks held.
        tokens: tokens in them.
        text_bytes: bytes of the documents' text.
        state_bytes: size of the file with the decoding state; 0: there is none.
        state_sha256: its digest.
    """

    segments: int = 0
    journal_bytes: int = 0
    journal_sha256: str = hashlib.sha256().hexdigest()
    chunks: int = 0
    tokens: int = 0
    text_bytes: int = 0
    state_bytes: int = 0
    state_sha256: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not 0 <= value <= MAX_COUNT:
                raise ValueError(f"{field.name} must be 0 to {MAX_COUNT}, got {value}")

    @property
    def state_file(self) -> str | None:
        """Name of the file with the decoding state."""
        return f"state-{self.segments:08d}.safetensors" if self.state_bytes else None


@dataclass(frozen=True)
class DocumentPart:
    """What one segment holds of one document.

    Args:
        name: of the document.
        begins: the document's first chunk is in this part.
        ends: its last chunk is.
        chunks: chunks of the part.
        tokens: tokens in them.
        text_bytes: bytes of its text; 0 for a text that is not kept.
    """

    name: str
    begins: bool
    ends: bool
    chunks: int
    tokens: int
    text_bytes: int

    def __post_init__(self) -> None:
        if min(self.chunks, self.tokens, self.text_bytes) < 0:
            raise ValueError(f"counts must not be negative, got {self}")


@dataclass(frozen=True)
class Segment:
    """A line of the journal: what one commit added.

    Args:
        crc32: of what it added to each of `DATA_FILES`, in that order.
        parts: of documents, in order.
    """

    crc32: tuple[int, ...]
    parts: tuple[DocumentPart, ...]

    @property
    def chunks(self) -> int:
        return sum(part.chunks for part in self.parts)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def text_bytes(self) -> int:
        return sum(part.text_bytes for part in self.parts)

    def line(self) -> bytes:
        """The journal's line."""
        return json.dumps(asdict(self), ensure_ascii=True, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """The reverse of `line`.

        Raises:
            ValueError: another line.
        """
        value = json.loads(line)
        if not isinstance(value, dict) or value.keys() != {"crc32", "parts"}:
            raise ValueError(f"expected crc32 and parts, got {short(value)}")
        crc32, parts = value["crc32"], value["parts"]
        if not isinstance(crc32, list) or len(crc32) != len(DATA_FILES) or not all(map(_is_int, crc32)):
            raise ValueError(f"crc32: expected {len(DATA_FILES)} numbers, got {short(crc32)}")
        if not isinstance(parts, list):
            raise ValueError(f"parts: expected a list, got {short(parts)}")
        return cls(tuple(crc32), tuple(from_json(DocumentPart, part, "parts") for part in parts))


@dataclass(frozen=True)
class Manifest:
    """The whole manifest.

    Args:
        description: of the archive.
        head: the last commit: where a writer goes on.
        finished: the last build or append that came to its end: what readers see. ``None``: none has.
    """

    description: ArchiveDescription
    head: Point
    finished: Point | None

    def dump(self) -> bytes:
        """The file's bytes."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return _text(body | {"sha256": hashlib.sha256(_text(body)).hexdigest()})

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            DRTError: none there, one of a later format, or a damaged one.
        """
        try:
            raw = read_bytes(path, MAX_BYTES)
        except DRTError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                raise DRTError(f"{path.parent} is not an archive: it has no {path.name}") from error
            raise
        try:
            return cls._parse(raw)
        except (ValueError, RecursionError) as error:
            raise DRTError(f"{path}: {error}") from error

    @classmethod
    def _parse(cls, raw: bytes) -> Manifest:
        try:
            value = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"damaged, not JSON: {error}") from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f'not the manifest of an archive: expected "format": "{FORMAT}"')
        version = value.get("format_version")
        if version != FORMAT_VERSION or not _is_int(version):
            raise ValueError(f"format version {short(version)}, but this drt reads version {FORMAT_VERSION}")
        digest = value.pop("sha256", None)
        if digest != hashlib.sha256(_text(value)).hexdigest() or raw != _text(value | {"sha256": digest}):
            raise ValueError("damaged: its checksum is not that of its content")
        if value.keys() != {"format", "format_version", "description", "head", "finished"}:
            raise ValueError(f"expected description, head and finished, got {', '.join(sorted(value))}")
        finished = value["finished"]
        manifest = cls(
            from_json(ArchiveDescription, value["description"], "description"),
            from_json(Point, value["head"], "head"),
            None if finished is None else from_json(Point, finished, "finished"),
        )
        manifest.check()
        return manifest

    def check(self) -> None:
        """Compare the counts with each other.

        Raises:
            ValueError: no archive has them.
        """
        head, finished = self.head, self.finished or Point()
        for name in ("segments", "journal_bytes", "chunks", "tokens", "text_bytes"):
            held, most = getattr(finished, name), getattr(head, name)
            if held > most:
                raise ValueError(f"finished.{name}: expected at most {most}, as in head, got {held}")
        most = head.chunks * self.description.chunk_size
        if head.tokens > most:
            raise ValueError(
                f"head.tokens: expected at most {most} in {head.chunks} chunks, got {head.tokens}"
            )


def _text(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def from_json(kind: type[T], value: object, where: str) -> T:
    """A dataclass of plain fields from a JSON object with just those fields."""
    types = _types_of(kind)
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise ValueError(f"{where}: expected {', '.join(types)}, got {short(value)}")
    for name, wanted in types.items():
        if type(value[name]) is not wanted:
            raise ValueError(f"{where}.{name}: expected {wanted.__name__}, got {short(value[name])}")
    return kind(**value)
