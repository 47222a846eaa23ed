"""An approximate index of an archive's landmarks (faiss), so that a question need not score them all.

The file `landmarks.faiss` in the archive's folder: a line of JSON (the point of the archive that it covers, and the
checksum of the whole), the checksum of each landmark that it covers, then the index as faiss writes it. It is replaced
whole. Chunks never change once they are committed: an index stays right when more are appended, for the first ones.

Landmarks are held in inverted lists, a byte a number, and only name candidates: whoever searches ranks them by the
landmarks themselves.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drt.errors import DRTError
from drt.memory.manifest import Point, from_json

INDEX_FILE = "landmarks.faiss"
FORMAT, FORMAT_VERSION = "drt-landmark-index", 1
CANDIDATES = 64  # named for a query, at least
TRAINED_ON = 64  # landmarks for each list, to choose its centre by
LEAST_IN_LIST = 40  # landmarks in a list, on average; faiss wants 39 to train on
HEAD_BYTES = 2**16  # of the line of JSON, at most


class IndexKind(NamedTuple):
    """What faiss makes: see its `index_factory` and `ParameterSpace`.

    Attributes:
        factory: its parts; `{lists}` stands for a number of inverted lists.
        parameters: of a search.
    """

    factory: str
    parameters: str


KIND = IndexKind("IVF{lists},SQ8", "nprobe=64")  # chosen by benchmarks/landmark_index.py


class ApproximateIndex:
    """Finds most of the largest dot products among the first landmarks of an archive, which has one row.

    Args:
        point: of the archive that it covers.
        crc32: (n,) uint32 checksum of each landmark as it lies in the archive.
        index: of faiss.
    """

    def __init__(self, point: Point, crc32: NDArray[np.uint32], index: Any) -> None:
        self.point, self.crc32, self.index = point, crc32, index

    @property
    def num_landmarks(self) -> int:
        """It knows the landmarks [0, num_landmarks)."""
        return self.point.chunks

    def search(self, query: Tensor, count: int) -> Tensor:
        """Candidates (m, max(count, 64)) int64 for queries (m, H) float32 on the CPU, -1 for an empty slot."""
        _, found = self.index.search(query.numpy(), max(count, CANDIDATES))
        return torch.from_numpy(found)

    def is_sound(self, numbers: Tensor, landmarks: Tensor) -> bool:
        """Whether landmarks (m, H) that it knows, as they lie in the archive, are those that it was made of."""
        return bool((_checksums(landmarks) == self.crc32[numbers.numpy()]).all())


def build_index(
    point: Point, sample: Tensor, blocks: Iterable[Tensor], kind: IndexKind = KIND
) -> ApproximateIndex:
    """Index all landmarks of an archive.

    Args:
        point: of the archive.
        sample: (`training_size`, H), some of them.
        blocks: (n_i, H), all of them in order, as they lie in the archive; none is held after it was added.
        kind: of the index.

    Raises:
        DRTError: faiss is not installed.
    """
    faiss = import_faiss()
    factory = kind.factory.format(lists=num_lists(point.chunks))
    index = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    faiss.ParameterSpace().set_index_parameters(index, kind.parameters)
    index.train(sample.float().numpy())
    crc32 = []
    for block in blocks:
        index.add(block.float().numpy())
        crc32.append(_checksums(block))
    return ApproximateIndex(point, np.concatenate(crc32), index)


def num_lists(num_landmarks: int) -> int:
    """Inverted lists of an index: four times the root of what it holds."""
    return max(1, min(round(4 * sqrt(num_landmarks)), num_landmarks // LEAST_IN_LIST))


def training_size(num_landmarks: int) -> int:
    """Landmarks to train an index of so many on."""
    return min(num_landmarks, TRAINED_ON * num_lists(num_landmarks))


def dump_index(index: ApproximateIndex) -> bytes:
    """The file's bytes."""
    body = index.crc32.tobytes() + import_faiss().serialize_index(index.index).tobytes()
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "point": asdict(index.point)}
    return json.dumps(head | {"crc32": _checksum(head, body)}).encode() + b"\n" + body


def load_index(folder: Path, *, verify: bool) -> ApproximateIndex:
    """Read the index of an archive that has one.

    Args:
        folder: of the archive.
        verify: compare it with its checksum first; faiss makes no sense of a damaged one and may not survive it.

    Raises:
        DRTError: it is damaged or of a later format, or faiss is not installed.
    """
    point, body = _read(folder / INDEX_FILE, verify)
    crc32 = np.frombuffer(body, np.uint32, point.chunks)
    index = import_faiss().deserialize_index(np.frombuffer(body, np.uint8, offset=crc32.nbytes))
    return ApproximateIndex(point, crc32, index)


def check_whole(folder: Path) -> None:
    """Read the index of an archive that has one, and make sure that it is what was written.

    Raises:
        DRTError: it is not.
    """
    _read(folder / INDEX_FILE, verify=True)


def indexed_point(folder: Path) -> Point | None:
    """The point of an archive that its index covers; ``None``: it has none.

    Raises:
        DRTError: it is damaged or of a later format.
    """
    path = folder / INDEX_FILE
    try:
        with path.open("rb") as file:
            return _read_head(path, file.readline(HEAD_BYTES))[1]
    except FileNotFoundError:
        return None


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        DRTError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise DRTError(
            "a landmark index wants faiss: pip install faiss-cpu, or search without one"
        ) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _read(path: Path, verify: bool) -> tuple[Point, bytes]:
    with path.open("rb") as file:
        head, point = _read_head(path, file.readline(HEAD_BYTES))
        body = file.read()
    crc32 = head.pop("crc32")
    if verify and crc32 != _checksum(head, body):
        raise DRTError(f"{path} is damaged: its checksum is not that of its content")
    return point, body


def _read_head(path: Path, line: bytes) -> tuple[dict[str, Any], Point]:
    try:
        head = json.loads(line)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f'wanted "format": "{FORMAT}"')
        if head.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format version {head.get('format_version')!r}, but this drt reads version {FORMAT_VERSION}"
            )
        if head.keys() != {"format", "format_version", "point", "crc32"}:
            raise ValueError(f"wanted point and crc32, got {', '.join(sorted(head))}")
        return head, from_json(Point, head["point"], "point")
    except (ValueError, RecursionError) as error:
        raise DRTError(f"{path} is damaged or no landmark index: {error}") from error


def _checksums(landmarks: Tensor) -> NDArray[np.uint32]:
    """(n,) of landmarks (n, H)."""
    records = landmarks.contiguous().view(torch.uint8).numpy()
    return np.array([zlib.crc32(record) for record in records], np.uint32)


def _checksum(head: dict[str, Any], body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(json.dumps(head).encode()))
