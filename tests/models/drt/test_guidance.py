"""Guidance of the retrieval scores by chunks that are known to be right."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from drt.models.drt import DRTConfig, DRTForCausalLM

CHUNK = 4


def tiny_model() -> DRTForCausalLM:
    torch.manual_seed(0)
    config = DRTConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_lower_layers=1,
        num_upper_layers=2,
        num_groups=2,
        num_encoder_layers=1,
        num_attention_heads=2,
        chunk_size=CHUNK,
        retrieval_top_k=2,
        sliding_window=6,
        learned_temperature=True,
    )
    return DRTForCausalLM(config).eval()


def some_ids() -> torch.Tensor:
    return torch.randint(2, 50, (2, 8 * CHUNK), generator=torch.Generator().manual_seed(1))


def test_it_is_the_cross_entropy_of_the_scores_with_the_right_chunk() -> None:
    """Scores, weights and selection of a model that reads every chunk tell what the loss must be."""
    model, ids = tiny_model(), some_ids()
    for retriever in model.model.retrievers:
        retriever.top_k = 8
    targets = torch.tensor(
        [[0, 7 * CHUNK - 1, 2 * CHUNK], [1, 5 * CHUNK + 1, 3], [1, 3, 2]]
    )  # the last: one chunk
    with torch.no_grad():
        outputs = model(ids, use_cache=False, output_retrieval=True, retrieval_targets=targets)
    losses = []
    for indices, weights in zip(outputs.chunk_indices, outputs.chunk_weights, strict=True):
        for row, asking, wanted in ((0, 6, 2), (1, 5, 0)):
            place = int((indices[row, asking] == wanted).nonzero())
            losses.append(-weights[row, asking, place].log())
    torch.testing.assert_close(outputs.retrieval_loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    assert outputs.retrieval_recall == 1


def test_recall_counts_what_was_selected() -> None:
    model, ids = tiny_model(), some_ids()
    with torch.no_grad():
        found = model(ids, use_cache=False, output_retrieval=True).chunk_indices
        targets = torch.tensor([[0, 7 * CHUNK - 1, chunk * CHUNK] for chunk in range(6)])
        outputs = model(ids, use_cache=False, retrieval_targets=targets)
    hits = sum(chunk in indices[0, 6].tolist() for indices in found for chunk in range(6))
    assert hits == 4  # two groups select two chunks each
    assert outputs.retrieval_recall == pytest.approx(hits / 12)


def test_gradient_reaches_queries_and_keys_alone() -> None:
    model, ids = tiny_model(), some_ids()
    targets = torch.tensor([[0, 7 * CHUNK - 1, 0]])
    model(ids, use_cache=False, retrieval_targets=targets).retrieval_loss.backward()
    assert model.model.retrievers[1].norm.weight.grad.abs().max() > 0
    assert model.model.chunk_encoder.norm.weight.grad.abs().max() > 0
    assert model.model.upper_layers[1].mlp.down_proj.weight.grad is None  # of the last group: above its query


def test_targets_change_nothing_else() -> None:
    model, ids = tiny_model(), some_ids()
    with torch.no_grad():
        plain = model(ids, use_cache=False)
        guided = model(ids, use_cache=False, retrieval_targets=torch.tensor([[0, 20, 0]]))
    assert plain.retrieval_loss is None
    torch.testing.assert_close(guided.logits, plain.logits, rtol=0, atol=0)


def test_no_pair_that_counts_gives_a_loss_of_zero() -> None:
    with torch.no_grad():
        outputs = tiny_model()(
            some_ids(), use_cache=False, retrieval_targets=torch.empty(0, 3, dtype=torch.long)
        )
    assert (outputs.retrieval_loss, outputs.retrieval_recall) == (0, 0)


@pytest.mark.parametrize("targets", [[[0, 1]], [[2, 20, 0]], [[0, 32, 0]], [[0, -1, 0]]])
def test_targets_that_do_not_fit_are_refused(targets: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="retrieval_targets"):
        tiny_model()(some_ids(), use_cache=False, retrieval_targets=torch.tensor(targets))


def test_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="retrieval_targets"), torch.no_grad():
        tiny_model()(some_ids(), use_cache=True, retrieval_targets=torch.tensor([[0, 20, 0]]))


def test_each_row_may_keep_columns_of_its_own() -> None:
    """Logits at (B, n) positions are those of the whole, in training and where rows are padded."""
    model, ids = tiny_model(), some_ids()
    kept = torch.tensor([[0, 3, 30], [5, 6, 31]])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        torch.testing.assert_close(
            model(ids, use_cache=False, logits_to_keep=kept).logits,
            whole[torch.arange(2)[:, None], kept],
            rtol=1e-4,
            atol=1e-5,
        )
        mask = torch.ones_like(ids)
        mask[0, 31:] = 0
        padded = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
    torch.testing.assert_close(padded[1], whole[1, kept[1]], rtol=1e-4, atol=1e-5)
    assert F.cross_entropy(padded.flatten(0, 1), ids.gather(1, kept).flatten()).isfinite()
