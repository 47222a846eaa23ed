"""Windows: each token once an epoch, the same for the same seed, shared over ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from drt.data.corpus import Corpus, open_corpus
from drt.data.corpus_writer import ShardWriter, write_manifest
from drt.data.sampling import WindowSampler
from drt.errors import DRTError

LENGTHS = [30, 9, 47, 10]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Token i of the stream has the id i; four documents in two shards."""
    writer = ShardWriter(tmp_path, "train", "uint16", shard_tokens=50)
    stream = np.split(np.arange(sum(LENGTHS)), np.cumsum(LENGTHS)[:-1])
    shards = [writer.add(str(index), tokens, 1) for index, tokens in enumerate(stream)]
    described = [shard for shard in [*shards, writer.close()] if shard is not None]
    assert len(described) == 2
    tokenizer = {"name": "own", "fingerprint": "", "vocab_size": 100, "document_end": None}
    write_manifest(tmp_path, "uint16", tokenizer, {"train": described}, [])
    return open_corpus(tmp_path, "train")


def epoch(sampler: WindowSampler, number: int) -> np.ndarray:
    size = sampler.windows_per_epoch
    return np.stack([sampler[index] for index in range(number * size, (number + 1) * size)])


@pytest.mark.parametrize("inside_documents", [True, False])
def test_windows_of_an_epoch_are_contiguous_and_disjoint(corpus: Corpus, inside_documents: bool) -> None:
    sampler = WindowSampler(corpus, 10, 0, inside_documents=inside_documents)
    assert sampler.windows_per_epoch == (3 + 0 + 4 + 1 if inside_documents else 9)
    starts = []
    for number in range(20):
        windows = epoch(sampler, number)
        assert (np.diff(windows, axis=1) == 1).all()
        assert len(np.unique(windows)) == windows.size
        starts.append(windows[:, 0].tolist())
    assert len({tuple(row) for row in starts}) == 20  # every epoch is another
    ends = np.cumsum(LENGTHS)
    crossing = [start for row in starts for start in row if ((start < ends) & (ends < start + 10)).any()]
    assert bool(crossing) != inside_documents
    # The shift reaches both the first and the last token of the longest document.
    assert {39, 85} <= {token for row in starts for start in row for token in range(start, start + 10)}


def test_windows_follow_from_number_and_seed(corpus: Corpus) -> None:
    one, two = (WindowSampler(corpus, 10, 5, inside_documents=False) for _ in range(2))
    forward = [one[number].tolist() for number in range(30)]
    backward = [two[number].tolist() for number in reversed(range(30))]
    assert forward == backward[::-1]
    other = WindowSampler(corpus, 10, 6, inside_documents=False)
    assert forward != [other[number].tolist() for number in range(30)]


def test_ranks_share_the_rows_of_a_step(corpus: Corpus) -> None:
    sampler = WindowSampler(corpus, 10, 0, inside_documents=False)
    for step in (0, 3):
        whole = sampler.rows(step, 4)
        assert whole.dtype == np.int64
        assert np.array_equal(whole, np.stack([sampler[4 * step + row] for row in range(4)]))
        for world_size in (2, 4):
            shares = [sampler.rows(step, 4, rank, world_size) for rank in range(world_size)]
            assert np.array_equal(whole, np.concatenate(shares))
    with pytest.raises(ValueError, match="expected a multiple of the 3 ranks, got 4"):
        sampler.rows(0, 4, 0, 3)


@pytest.mark.parametrize(("length", "inside_documents", "found"), [(48, True, 47), (97, False, 96)])
def test_a_corpus_shorter_than_a_window_is_refused(
    corpus: Corpus, length: int, inside_documents: bool, found: int
) -> None:
    WindowSampler(corpus, length - 1, 0, inside_documents=inside_documents)
    with pytest.raises(
        DRTError, match=rf"shorter than one sequence: expected {length} tokens, .* has {found}"
    ):
        WindowSampler(corpus, length, 0, inside_documents=inside_documents)
