"""Grouped cross attention: every block of queries attends to the chunks it retrieved, one softmax a chunk."""

from drt.ops.grouped_cross_attention.api import (
    IMPLEMENTATIONS,
    attend_gathered_chunks,
    gather_chunks,
    grouped_cross_attention,
)

__all__ = ["IMPLEMENTATIONS", "attend_gathered_chunks", "gather_chunks", "grouped_cross_attention"]
