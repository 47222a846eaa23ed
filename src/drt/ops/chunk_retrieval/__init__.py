"""Score past chunks by their landmarks and select the best, in blocks."""

from drt.ops.chunk_retrieval.api import RetrievedChunks, retrieve_chunks, select_chunks

__all__ = ["RetrievedChunks", "retrieve_chunks", "select_chunks"]
