"""Arguments that do not fit: a ValueError that says what was expected and what was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drt.ops.grouped_cross_attention import attend_gathered_chunks, gather_chunks, grouped_cross_attention


def table_arguments() -> dict[str, Any]:
    return {
        "query": torch.zeros(2, 6, 4, 8),
        "chunk_keys": torch.zeros(2, 5, 3, 2, 8),
        "chunk_values": torch.zeros(2, 5, 3, 2, 8),
        "chunk_indices": torch.zeros(2, 3, 4, dtype=torch.long),
        "chunk_weights": torch.zeros(2, 3, 4),
        "chunk_lengths": torch.full((2, 5), 3),
        "block_size": 2,
    }


def gathered_arguments() -> dict[str, Any]:
    return {
        "query": torch.zeros(2, 6, 4, 8),
        "gathered_keys": torch.zeros(2, 3, 4, 3, 2, 8),
        "gathered_values": torch.zeros(2, 3, 4, 3, 2, 8),
        "chunk_weights": torch.zeros(2, 3, 4),
        "gathered_lengths": torch.full((2, 3, 4), 3),
        "block_size": 2,
    }


TABLE = [
    ("query", torch.zeros(2, 6, 32), r"query must be \(B, L, h, D\).*\(2, 6, 32\)"),
    ("query", torch.zeros(2, 6, 4, 8, dtype=torch.long), "query must have a floating dtype.*int64"),
    ("query", torch.zeros(2, 7, 4, 8), "multiple of block_size=2; got L=7"),
    ("query", torch.zeros(3, 6, 4, 8), "batch size, 3; got 2"),
    ("query", torch.zeros(2, 6, 4, 16), "head dimension, 16; got 8"),
    ("query", torch.zeros(2, 6, 3, 8), "h_kv must divide query's h=3 heads; got h_kv=2"),
    (
        "query",
        torch.zeros(2, 6, 4, 8, dtype=torch.float64),
        "query's dtype, torch.float64; got torch.float32",
    ),
    ("query", torch.zeros(2, 6, 4, 8, device="meta"), "on query's device, meta; got cpu"),
    ("block_size", 0, "block_size must be at least 1; got 0"),
    ("chunk_keys", torch.zeros(2, 5, 3, 8), r"chunk_keys must be \(B, C, S, h_kv, D\).*\(2, 5, 3, 8\)"),
    (
        "chunk_keys",
        torch.zeros(2, 6, 3, 2, 8),
        r"shape of chunk_keys, \(2, 6, 3, 2, 8\); got \(2, 5, 3, 2, 8\)",
    ),
    ("chunk_values", torch.zeros(2, 5, 3, 2, 8).half(), "chunk_values must have query's dtype.*float16"),
    ("chunk_indices", torch.zeros(2, 3), r"chunk_indices must be \(B, N, K\).*\(2, 3\)"),
    ("chunk_indices", torch.zeros(2, 3, 4), "chunk_indices must have an integer dtype; got torch.float32"),
    ("chunk_indices", torch.zeros(2, 3, 0, dtype=torch.long), "K >= 1 slots; got 0"),
    ("chunk_indices", torch.zeros(2, 2, 4, dtype=torch.long), r"L / block_size=3; got \(2, 2, 4\)"),
    (
        "chunk_indices",
        torch.full((2, 3, 4), 5),
        r"chunk_indices must lie in \[-1, 4\]; got values in \[5, 5\]",
    ),
    (
        "chunk_indices",
        torch.full((2, 3, 4), -2),
        r"chunk_indices must lie in \[-1, 4\]; got values in \[-2, -2\]",
    ),
    ("chunk_weights", torch.zeros(2, 3, 5), r"shape of chunk_indices, \(2, 3, 4\); got \(2, 3, 5\)"),
    (
        "chunk_weights",
        torch.zeros(2, 3, 4).long(),
        "chunk_weights must have a floating dtype; got torch.int64",
    ),
    ("chunk_lengths", torch.full((2, 4), 3), r"chunk_lengths must have shape \(2, 5\); got \(2, 4\)"),
    ("chunk_lengths", torch.full((2, 5), 3.0), "chunk_lengths must have an integer dtype; got torch.float32"),
    ("chunk_lengths", torch.full((2, 5), 4), r"chunk_lengths must lie in \[0, 3\]; got values in \[4, 4\]"),
    ("impl", "fast", "impl must be one of reference, cpu.*'fast'"),
]

GATHERED = [
    ("query", torch.zeros(2, 8, 4, 8), "N = L / block_size = 4 blocks.*got 3"),
    ("gathered_keys", torch.zeros(2, 3, 4, 3, 8), r"\(B, N, K, S, h_kv, D\).*\(2, 3, 4, 3, 8\)"),
    ("gathered_values", torch.zeros(2, 3, 4, 2, 2, 8), r"shape of gathered_keys.*got \(2, 3, 4, 2, 2, 8\)"),
    (
        "chunk_weights",
        torch.zeros(2, 3),
        r"first three dimensions of gathered_keys, \(2, 3, 4\); got \(2, 3\)",
    ),
    (
        "gathered_lengths",
        torch.full((2, 3), 3),
        r"gathered_lengths must have shape \(2, 3, 4\); got \(2, 3\)",
    ),
    ("gathered_lengths", torch.full((2, 3, 4), -1), r"gathered_lengths must lie in \[0, 3\]"),
    ("impl", "fast", "impl must be one of reference, cpu.*'fast'"),
]


@pytest.mark.parametrize(("name", "value", "message"), TABLE, ids=lambda x: x if isinstance(x, str) else "")
def test_chunks_by_index(name: str, value: Any, message: str) -> None:
    arguments = table_arguments()
    assert grouped_cross_attention(**arguments).shape == (2, 6, 4, 8)
    with pytest.raises(ValueError, match=message):
        grouped_cross_attention(**arguments | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"), GATHERED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_gathered_chunks(name: str, value: Any, message: str) -> None:
    arguments = gathered_arguments()
    assert attend_gathered_chunks(**arguments).shape == (2, 6, 4, 8)
    with pytest.raises(ValueError, match=message):
        attend_gathered_chunks(**arguments | {name: value})


def test_a_chunk_without_positions() -> None:
    keys = torch.zeros(2, 3, 4, 0, 2, 8)
    arguments = gathered_arguments() | {
        "gathered_keys": keys,
        "gathered_values": keys,
        "gathered_lengths": None,
    }
    with pytest.raises(ValueError, match="S >= 1 positions a chunk; got 0"):
        attend_gathered_chunks(**arguments)


def test_gathering_an_index_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"chunk_indices must lie in \[-1, 4\]; got values in \[0, 7\]"):
        gather_chunks(torch.zeros(1, 5, 3, 2, 8), torch.tensor([[[0, 7]]]))
