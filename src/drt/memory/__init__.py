"""Where chunks live. This package knows no model and no attention."""

from drt.memory.chunk_store import ChunkStore, GatheredChunks
from drt.memory.device_store import DeviceStore

__all__ = ["ChunkStore", "DeviceStore", "GatheredChunks"]
