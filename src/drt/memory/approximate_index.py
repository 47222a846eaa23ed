"""An approximate index of an archive's landmarks, so that a question need not score them all.

The file `landmarks.faiss` in the archive's folder holds plain arrays: a line of JSON (the point of the archive that it
covers, the arrays' sizes and a checksum of the whole), then the arrays of `IndexArrays` one after the other. It is
replaced whole. Chunks never change once they are committed: an index stays right when more are appended, for the first
ones.

faiss searches what is built from the arrays in memory and reads no file: its own format names other files, and it
opens them. Landmarks are held in inverted lists, a byte a number, and only name candidates: whoever searches ranks them
by the landmarks themselves.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from math import prod, sqrt
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drt.errors import DRTError
from drt.files import open_regular
from drt.memory.manifest import Point, from_json

INDEX_FILE = "landmarks.faiss"
FORMAT, FORMAT_VERSION = "drt-landmark-index", 2
LISTS_SEARCHED = 64  # for a query; chosen by benchmarks/landmark_index.py, like 8 bits a number
CANDIDATES = 64  # named for a query, at least
TRAINED_ON = 64  # landmarks for each list, to choose its center by
LEAST_IN_LIST = 40  # landmarks in a list, on average; faiss wants 39 to train on
HEAD_BYTES = 2**16  # of the line of JSON, at most


class EarlierIndexError(DRTError):
    """An index of a format that is not read any more: nothing is wrong with it but its age."""


class IndexSizes(NamedTuple):
    """Sizes of an index: landmarks n, inverted lists c, and the width H of a landmark."""

    num_landmarks: int
    num_lists: int
    width: int


class IndexArrays(NamedTuple):
    """What an index consists of.

    Attributes:
        crc32: (n,) uint32 checksum of each landmark as it lies in the archive.
        centers: (c, H) float32 center of each list.
        ranges: (2, H) float32 least value and width of each number of a landmark less its list's center.
        assignments: (n,) int32 list of each landmark.
        codes: (n, H) uint8 each landmark less its list's center: 256 steps of each number's range.
    """

    crc32: NDArray[np.uint32]
    centers: NDArray[np.float32]
    ranges: NDArray[np.float32]
    assignments: NDArray[np.int32]
    codes: NDArray[np.uint8]

    @staticmethod
    def layout(sizes: IndexSizes) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array."""
        count, lists, width = sizes
        return [
            ((count,), "<u4"),
            ((lists, width), "<f4"),
            ((2, width), "<f4"),
            ((count,), "<i4"),
            ((count, width), "u1"),
        ]

    @classmethod
    def num_bytes(cls, sizes: IndexSizes) -> int:
        """Bytes of all arrays."""
        return sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in cls.layout(sizes))

    @classmethod
    def unpack(cls, body: bytes, sizes: IndexSizes) -> Self:
        """The arrays that lie one after the other in `num_bytes` bytes.

        Raises:
            ValueError: they hold what no index has.
        """
        found, offset = [], 0
        for shape, dtype in cls.layout(sizes):
            array = np.frombuffer(body, dtype, prod(shape), offset).reshape(shape)
            offset += array.nbytes
            found.append(array)
        arrays = cls(*found)
        if arrays.assignments.min() < 0 or arrays.assignments.max() >= sizes.num_lists:
            raise ValueError(f"expected lists in [0, {sizes.num_lists}), got others")
        if not (np.isfinite(arrays.centers).all() and np.isfinite(arrays.ranges).all()):
            raise ValueError("expected finite centers and ranges, got others")
        return arrays


class ApproximateIndex:
    """Finds most of the largest dot products among the first landmarks of an archive, which has one row.

    Args:
        point: of the archive that it covers.
        arrays: what it consists of.

    Raises:
        DRTError: faiss is not installed.
    """

    def __init__(self, point: Point, arrays: IndexArrays) -> None:
        self.point, self.crc32 = point, arrays.crc32.copy()  # no view: the other arrays need not stay
        self._index = _inverted_lists(arrays)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it never changes

    @property
    def num_landmarks(self) -> int:
        """It knows the landmarks [0, num_landmarks)."""
        return self.point.chunks

    def search(self, query: Tensor, count: int) -> Tensor:
        """Candidates (m, max(count, 64)) int64 for queries (m, H) float32 on the CPU, -1 for an empty slot."""
        _, found = self._index.search(query.numpy(), max(count, CANDIDATES))
        return torch.from_numpy(found)

    def is_sound(self, numbers: Tensor, landmarks: Tensor) -> bool:
        """Whether landmarks (m, H) that it knows, as they lie in the archive, are those that it was made of."""
        return bool((_checksums(landmarks) == self.crc32[numbers.numpy()]).all())


def build_index(sample: Tensor, count: int, blocks: Iterable[Tensor]) -> IndexArrays:
    """Index all landmarks of an archive.

    Args:
        sample: (`training_size`, H), some of them.
        count: of all.
        blocks: (n_i, H), all of them in order, as they lie in the archive; none is held after it was added.

    Raises:
        DRTError: faiss is not installed.
    """
    index = _new_index(sample.shape[1], num_lists(count))
    index.train(sample.float().numpy())
    crc32 = []
    for block in blocks:
        index.add(block.float().numpy())
        crc32.append(_checksums(block))
    return _arrays(index, np.concatenate(crc32))


def num_lists(num_landmarks: int) -> int:
    """Inverted lists of an index: four times the root of what it holds."""
    return max(1, min(round(4 * sqrt(num_landmarks)), num_landmarks // LEAST_IN_LIST))


def training_size(num_landmarks: int) -> int:
    """Landmarks to train an index of so many on."""
    return min(num_landmarks, TRAINED_ON * num_lists(num_landmarks))


def dump_index(point: Point, arrays: IndexArrays) -> bytes:
    """The file's bytes for an index of an archive at a point."""
    body = b"".join(array.tobytes() for array in arrays)
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "point": asdict(point)}
    head |= {"lists": len(arrays.centers), "width": arrays.codes.shape[1]}
    return _line(head | {"crc32": _checksum(head, body)}) + body


def load_index(folder: Path, width: int, *, verify: bool) -> ApproximateIndex:
    """Read the index of an archive that has one.

    Args:
        folder: of the archive.
        width: of the archive's landmarks.
        verify: compare it with its checksum first.

    Raises:
        DRTError: it is damaged, of another format or of landmarks of another width, or faiss is not installed.
    """
    return ApproximateIndex(*_read(folder / INDEX_FILE, width, verify))


def check_whole(folder: Path, width: int) -> None:
    """Read the index of an archive that has one, and make sure that it is what was written; arguments as `load_index`.

    Raises:
        DRTError: it is not.
    """
    _read(folder / INDEX_FILE, width, verify=True)


def indexed_point(folder: Path) -> Point | None:
    """The point of an archive that its index covers; ``None``: it has none.

    Raises:
        DRTError: it is damaged or of another format.
    """
    path = folder / INDEX_FILE
    if not os.path.lexists(path):
        return None
    with os.fdopen(open_regular(path), "rb") as file:
        return _read_head(path, file)[1]


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        DRTError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise DRTError(
            "a landmark index needs faiss: pip install faiss-cpu, or search without one (--search exact)"
        ) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _new_index(width: int, lists: int) -> Any:
    """An index of faiss without landmarks."""
    faiss = import_faiss()
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.nprobe = LISTS_SEARCHED
    return index


def _inverted_lists(arrays: IndexArrays) -> Any:
    """An index of faiss that searches the arrays."""
    faiss = import_faiss()
    lists, width = arrays.centers.shape
    index = _new_index(width, lists)
    index.quantizer.add(arrays.centers)
    faiss.copy_array_to_vector(arrays.ranges.flatten(), index.sq.trained)
    index.is_trained = True
    order = np.argsort(arrays.assignments, kind="stable")
    stops = np.cumsum(np.bincount(arrays.assignments, minlength=lists))
    for number, held in enumerate(np.split(order, stops[:-1])):
        if len(held):
            codes = arrays.codes[held]
            index.invlists.add_entries(number, len(held), faiss.swig_ptr(held), faiss.swig_ptr(codes))
    index.ntotal = len(order)
    return index


def _arrays(index: Any, crc32: NDArray[np.uint32]) -> IndexArrays:
    """The arrays of an index of faiss."""
    faiss = import_faiss()
    assignments = np.empty(index.ntotal, np.int32)
    codes = np.empty((index.ntotal, index.d), np.uint8)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            held = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
            assignments[held] = number
            codes[held] = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.d).reshape(
                size, -1
            )
    centers = index.quantizer.reconstruct_n(0, index.nlist)
    ranges = faiss.vector_to_array(index.sq.trained).reshape(2, -1)
    return IndexArrays(crc32, centers, ranges, assignments, codes)


def _read(path: Path, width: int, verify: bool) -> tuple[Point, IndexArrays]:
    with os.fdopen(open_regular(path), "rb") as file:
        head, point = _read_head(path, file)
        sizes = IndexSizes(point.chunks, head["lists"], head["width"])
        try:
            _check_sizes(sizes, width, os.fstat(file.fileno()).st_size - file.tell())
            body = file.read(IndexArrays.num_bytes(sizes))
            if verify and head.pop("crc32") != _checksum(head, body):
                raise ValueError("its checksum is not that of its content")
            return point, IndexArrays.unpack(body, sizes)
        except ValueError as error:
            raise _unreadable(path, str(error)) from error


def _check_sizes(sizes: IndexSizes, width: int, num_bytes: int) -> None:
    """Compare sizes with the archive's landmarks and with the bytes of the arrays, before any is read."""
    if sizes.width != width:
        raise ValueError(f"expected landmarks of {width} numbers, got {sizes.width}")
    if not 1 <= sizes.num_lists <= sizes.num_landmarks:
        raise ValueError(f"expected 1 to {sizes.num_landmarks} lists, got {sizes.num_lists}")
    if num_bytes != IndexArrays.num_bytes(sizes):
        raise ValueError(f"expected {IndexArrays.num_bytes(sizes)} bytes of arrays, got {num_bytes}")


def _read_head(path: Path, file: IO[bytes]) -> tuple[dict[str, Any], Point]:
    line = file.readline(HEAD_BYTES)
    try:
        head = json.loads(line)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f'expected "format": "{FORMAT}"')
        version = head.get("format_version")
        if type(version) is int and 0 < version < FORMAT_VERSION:
            raise EarlierIndexError(
                f"{path} is of format version {version}, but this drt reads version {FORMAT_VERSION}; make it anew "
                f"with drt memory index {path.parent}"
            )
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}, but this drt reads version {FORMAT_VERSION}")
        numbers = [head.get(name) for name in ("lists", "width", "crc32")]
        if len(head) != 6 or any(type(number) is not int for number in numbers) or line != _line(head):
            raise ValueError("expected point, lists, width and crc32, as they are written")
        return head, from_json(Point, head["point"], "point")
    except EarlierIndexError:
        raise
    except (KeyError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, reason: str) -> DRTError:
    return DRTError(
        f"{path} is damaged, or no landmark index of this format: {reason}; make it anew with drt memory index "
        f"{path.parent}, or search without it (--search exact)"
    )


def _line(head: dict[str, Any]) -> bytes:
    return json.dumps(head).encode() + b"\n"


def _checksums(landmarks: Tensor) -> NDArray[np.uint32]:
    """(n,) of landmarks (n, H)."""
    records = landmarks.contiguous().view(torch.uint8).numpy()
    return np.array([zlib.crc32(record) for record in records], np.uint32)


def _checksum(head: dict[str, Any], body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(json.dumps(head).encode()))
