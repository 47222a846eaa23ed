"""Where chunks live. This package knows no model and no attention."""

from drt.memory.archive import Archive, ChunkSource, Document
from drt.memory.archive_verify import verify_archive
from drt.memory.archive_writer import ArchiveWriter
from drt.memory.chunk_store import ChunkStore, GatheredChunks
from drt.memory.device_store import DeviceStore
from drt.memory.host_store import HostStore
from drt.memory.landmark_index import LandmarkIndex
from drt.memory.manifest import ArchiveDescription

__all__ = [
    "Archive",
    "ArchiveDescription",
    "ArchiveWriter",
    "ChunkSource",
    "ChunkStore",
    "DeviceStore",
    "Document",
    "GatheredChunks",
    "HostStore",
    "LandmarkIndex",
    "verify_archive",
]
