"""Retrieval in blocks against all scores at once: selection, weights, gradients, noise and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from drt.ops.chunk_retrieval import RetrievedChunks, api, retrieve_chunks, select_chunks
from drt.testing.largest_tensor import LargestTensor


def draw(queries: int, chunks: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, landmarks and visible counts of two rows: 0, all, and what lies between."""
    generator = torch.Generator().manual_seed(queries + chunks)
    query = torch.randn(2, queries, 16, generator=generator).to(dtype)
    landmarks = torch.randn(2, chunks, 16, generator=generator).to(dtype)
    visible = torch.randint(0, chunks + 1, (2, queries), generator=generator)
    visible[0, 0], visible[1, -1] = 0, chunks
    return query, landmarks, visible


def dense(query: Tensor, landmarks: Tensor, visible: Tensor, top_k: int, scale: float) -> RetrievedChunks:
    """All scores at once, in float64."""
    scores = query.double() @ landmarks.double().transpose(1, 2) * scale
    scores = scores.masked_fill(torch.arange(landmarks.shape[1]) >= visible.unsqueeze(-1), -torch.inf)
    missing = max(0, top_k - landmarks.shape[1])
    scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    best, indices = scores.topk(top_k, -1)
    weights = best.softmax(-1).nan_to_num(0.0)
    return RetrievedChunks(indices.masked_fill(best == -torch.inf, -1), weights, best)


def assert_dense(actual: RetrievedChunks, expected: RetrievedChunks) -> None:
    assert torch.equal(actual.chunk_indices, expected.chunk_indices)
    torch.testing.assert_close(actual.chunk_weights.double(), expected.chunk_weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.scores.double(), expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize(("queries", "chunks"), [(1, 1), (1, 40), (5, 3), (40, 40), (70, 7)])
def test_all_scores_at_once_give_the_same(queries: int, chunks: int, top_k: int) -> None:
    query, landmarks, visible = draw(queries, chunks)
    found = retrieve_chunks(query, landmarks, visible, top_k=top_k)
    assert_dense(found, dense(query, landmarks, visible, top_k, 0.25))
    assert torch.equal(select_chunks(query, landmarks, visible, top_k=top_k), found.chunk_indices)
    scaled = retrieve_chunks(query, landmarks, visible, top_k=top_k, scale=torch.tensor(1.7))
    assert_dense(scaled, dense(query, landmarks, visible, top_k, float(torch.tensor(1.7))))


@pytest.mark.parametrize("sizes", [(40,), (13, 27), (1, 1, 38), (0, 40), (39, 1, 0)], ids=str)
@pytest.mark.parametrize("columns", [4, 7, 8192])
def test_blocks_of_landmarks_and_of_queries(monkeypatch, sizes: tuple[int, ...], columns: int) -> None:
    monkeypatch.setattr(api, "LANDMARK_BLOCK", columns)
    monkeypatch.setattr(api, "QUERY_BLOCK", 6)
    query, landmarks, visible = draw(20, 40)
    blocks = landmarks.split(sizes, 1)
    assert_dense(retrieve_chunks(query, blocks, visible, top_k=5), dense(query, landmarks, visible, 5, 0.25))


def test_only_visible_chunks_are_found() -> None:
    query, landmarks, _ = draw(40, 40)
    visible = torch.arange(40).expand(2, -1)  # query i sees the chunks before i
    indices, weights, scores = retrieve_chunks(query, landmarks, visible, top_k=4)
    assert (indices < visible.unsqueeze(-1)).all()
    assert torch.equal((indices >= 0).sum(-1), visible.clamp_max(4)), "every visible chunk or K of them"
    for empty in (weights, scores.exp()):
        assert empty[indices < 0].count_nonzero() == 0
    assert (scores[indices < 0] == -torch.inf).all()
    assert indices[:, 0].eq(-1).all()
    torch.testing.assert_close(weights[:, 1:].sum(-1), torch.ones(2, 39))
    later = landmarks.clone()
    later[:, 20:] = 1e3
    found = retrieve_chunks(query, later, visible, top_k=4)
    assert torch.equal(found.chunk_indices[:, :21], indices[:, :21])
    assert torch.equal(found.chunk_weights[:, :21], weights[:, :21])


def test_no_chunk_at_all() -> None:
    query = torch.randn(2, 3, 16, requires_grad=True)
    for landmarks in (torch.zeros(2, 0, 16), []):
        indices, weights, _ = retrieve_chunks(query, landmarks, torch.zeros(2, 3, dtype=torch.long), top_k=2)
        assert indices.eq(-1).all()
        assert weights.count_nonzero() == 0
    nobody = retrieve_chunks(
        query[:, :0], torch.zeros(2, 5, 16), torch.zeros(2, 0, dtype=torch.long), top_k=2
    )
    assert nobody.chunk_weights.shape == (2, 0, 2)


def test_bfloat16_inputs_have_float32_weights() -> None:
    """Scored in float32: as exact as the rounded inputs allow."""
    query, landmarks, visible = draw(30, 25, torch.bfloat16)
    found = retrieve_chunks(query, landmarks, visible, top_k=4)
    assert found.chunk_weights.dtype == found.scores.dtype == torch.float32
    assert_dense(found, dense(query, landmarks, visible, 4, 0.25))


def test_autocast_does_not_round_the_scores() -> None:
    query, landmarks, visible = draw(30, 25)
    plain = retrieve_chunks(query, landmarks, visible, top_k=4)
    with torch.autocast("cpu", torch.bfloat16):
        found = retrieve_chunks(query, landmarks, visible, top_k=4)
    assert all(torch.equal(one, two) for one, two in zip(found, plain, strict=True))


def test_without_looking_at_values_the_same_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a look would make the host wait."""
    query, landmarks, visible = draw(40, 40)
    plain = select_chunks(query, landmarks.split(7, 1), visible, top_k=5)
    monkeypatch.setattr(api, "_may_look", lambda _: False)
    assert torch.equal(select_chunks(query, landmarks.split(7, 1), visible, top_k=5), plain)


def test_the_selection_compiles_to_one_graph() -> None:
    query, landmarks, visible = draw(40, 40)
    compiled = torch.compile(retrieve_chunks, fullgraph=True, backend="aot_eager")
    plain = retrieve_chunks(query, landmarks, visible, top_k=5)
    found = compiled(query, landmarks, visible, top_k=5)
    assert torch.equal(found.chunk_indices, plain.chunk_indices)
    torch.testing.assert_close(found.chunk_weights, plain.chunk_weights)


@pytest.mark.parametrize("blocks", [1, 3])
def test_gradients_of_the_weights(blocks: int) -> None:
    """Against float64 for the same selection, and against finite differences."""
    query, landmarks, visible = draw(5, 12)
    scale = torch.tensor(0.4)
    leaves = [x.requires_grad_() for x in (query, landmarks, scale)]
    incoming = torch.randn(2, 5, 3)

    def weights(query: Tensor, landmarks: Tensor, scale: Tensor) -> Tensor:
        parts = landmarks.split(12 // blocks, 1)
        return retrieve_chunks(query, parts, visible, top_k=3, scale=scale).chunk_weights

    gradients = torch.autograd.grad(weights(*leaves), leaves, incoming)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = dense(*exact_leaves[:2], visible, 3, exact_leaves[2]).chunk_weights
    expected = torch.autograd.grad(exact, exact_leaves, incoming.double())
    for got, want in zip(gradients, expected, strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    step = 1e-3  # scores are float32: a smaller step would measure their rounding
    assert torch.autograd.gradcheck(
        lambda *x: weights(*x).double(),
        [x.detach().double().requires_grad_() for x in leaves],
        eps=step,
        atol=1e-3,
    )


def test_a_query_that_sees_nothing_has_finite_gradients() -> None:
    query, landmarks, _ = draw(3, 4)
    leaves = [x.requires_grad_() for x in (query, landmarks)]
    visible = torch.tensor([[0, 1, 4], [0, 0, 0]])
    weights = retrieve_chunks(*leaves, visible, top_k=2).chunk_weights
    gradients = torch.autograd.grad(weights.square().sum(), leaves)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert gradients[0][1].count_nonzero() == 0


def test_noise_never_enters_the_weights() -> None:
    query, landmarks, visible = draw(60, 30)
    noisy = retrieve_chunks(query, landmarks, visible, top_k=4, gumbel=True)
    quiet = retrieve_chunks(query, landmarks, visible, top_k=4)
    assert not torch.equal(noisy.chunk_indices, quiet.chunk_indices)
    assert (noisy.chunk_indices < visible.unsqueeze(-1)).all()
    assert torch.equal(noisy.chunk_indices < 0, quiet.chunk_indices < 0)
    scores = (query @ landmarks.transpose(1, 2) * 0.25).gather(-1, noisy.chunk_indices.clamp_min(0))
    scores = scores.masked_fill(noisy.chunk_indices < 0, -torch.inf)
    torch.testing.assert_close(noisy.scores, scores)
    torch.testing.assert_close(noisy.chunk_weights, scores.softmax(-1).nan_to_num(0.0))


def test_noise_follows_its_generator() -> None:
    inputs = draw(60, 30)

    def select(generator: torch.Generator | None) -> Tensor:
        return select_chunks(*inputs, top_k=4, gumbel=True, generator=generator)

    first = select(torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    assert torch.equal(select(torch.Generator().manual_seed(5)), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert not torch.equal(select(torch.Generator().manual_seed(6)), first)
    torch.manual_seed(7)
    first = select(None)
    torch.manual_seed(7)
    assert torch.equal(select(None), first)


@pytest.mark.parametrize("blocks", [1, 3])
def test_noisy_selection_is_sampling_without_replacement(blocks: int) -> None:
    """Gumbel top-k: the first follows the softmax, the second the softmax over the others (Plackett-Luce)."""
    draws, chunks = 20_000, 6
    landmarks = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 1.5]).view(1, chunks, 1)
    query, visible = torch.ones(1, draws, 1), torch.full((1, draws), chunks)
    indices = select_chunks(
        query,
        landmarks.split(chunks // blocks, 1),
        visible,
        top_k=2,
        scale=1.0,
        gumbel=True,
        generator=torch.Generator().manual_seed(0),
    )[0]
    first = landmarks.flatten().double().softmax(0)
    pairs = first.unsqueeze(1) * first / (1 - first.unsqueeze(1))
    pairs.fill_diagonal_(0)
    seen = torch.zeros(chunks, chunks).index_put(
        (indices[:, 0], indices[:, 1]), torch.ones(draws), accumulate=True
    )
    for observed, probability in ((seen.sum(1), first), (seen.flatten(), pairs.flatten())):
        possible = probability > 0
        expected = probability[possible] * draws
        chi_square = ((observed[possible] - expected).square() / expected).sum()
        freedom = int(possible.sum()) - 1
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # mean and deviation of chi-square
        assert observed[~possible].sum() == 0


@pytest.mark.parametrize("gumbel", [False, True])
def test_scores_are_never_held_whole(gumbel: bool) -> None:
    chunks = 4096
    generator = torch.Generator().manual_seed(0)
    query, landmarks = torch.randn(2, 1, chunks, 8, generator=generator)
    visible = torch.arange(chunks).unsqueeze(0)
    with LargestTensor() as largest:
        found = retrieve_chunks(query, landmarks, visible, top_k=8, gumbel=gumbel)
    assert chunks * 8 <= largest.numel <= api.QUERY_BLOCK * min(chunks, api.LANDMARK_BLOCK) < chunks**2
    assert found.chunk_indices.shape == (1, chunks, 8)


def test_columns_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LANDMARK_BLOCK", 300)
    query, landmarks, visible = (
        torch.zeros(1, 1000, 2),
        torch.zeros(1, 1000, 2),
        torch.arange(1000).unsqueeze(0),
    )
    with LargestTensor() as largest:
        select_chunks(query, landmarks, visible, top_k=2)
    assert largest.numel <= api.QUERY_BLOCK * 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"query": torch.zeros(2, 8)}, r"query must be \(B, N, H\).*got \(2, 8\)"),
        ({"visible": torch.zeros(2, 4)}, r"visible \(B, N\), got \(2, 3, 8\) and \(2, 4\)"),
        ({"landmarks": torch.zeros(2, 5, 7)}, r"landmarks must be \(2, C, 8\), got \(2, 5, 7\)"),
        ({"landmarks": [torch.zeros(2, 5, 8), torch.zeros(1, 5, 8)]}, r"got \(1, 5, 8\)"),
        ({"visible": torch.full((2, 3), 6)}, r"visible must lie in \[0, 5\], got 6 to 6"),
        ({"visible": torch.full((2, 3), -1)}, "got -1 to -1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "query": torch.zeros(2, 3, 8),
        "landmarks": torch.zeros(2, 5, 8),
        "visible": torch.zeros(2, 3, dtype=torch.long),
        "top_k": 2,
    }
    with pytest.raises(ValueError, match=message):
        retrieve_chunks(**(arguments | changes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_scores_landmarks_of_any_device_and_precision(dtype: torch.dtype, device: str) -> None:
    """Only shapes, dtypes and devices are computed, so that no GPU is required."""
    with FakeTensorMode():
        query = torch.empty(2, 5, 16, dtype=dtype, device="cuda")
        scores = api._scores(query, torch.empty(2, 7, 16, dtype=dtype, device=device), 0.25)
    assert (scores.dtype, scores.device.type) == (torch.float32, "cuda")
