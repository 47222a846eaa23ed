"""A text that is only read: the upper decoder runs over its end alone, and nothing comes out otherwise."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from drt.memory import DeviceStore
from drt.models.drt import DRTCache
from drt.models.drt.chunk_layout import upper_reach

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float64, but for the scores of chunks
RULES = [
    {},
    {"landmark_predicts": False},
    {"position_embedding": "rope"},
    {"num_upper_layers": 4, "num_groups": 1, "position_embedding": "rope"},
    {"num_upper_layers": 6, "num_groups": 3, "landmark_predicts": False},
    {"num_upper_layers": [1, 3], "landmark_predicts": False},
    {"num_upper_layers": [2, 1], "chunk_size": 17, "sliding_window": 6},
    {"chunk_size": 17, "sliding_window": 6},
    {"chunk_size": 1},
    {"sliding_window": 1},
    {"retrieval": False},
    {"num_upper_layers": 0, "num_groups": 1},
]
SIZES = [[150], [70, 25, 3, 35, 17], [1, 60, 1, 88], [45, 105]]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 50, (2, 156), generator=torch.Generator().manual_seed(1))


def read(model, ids, sizes, ends, mask, keep, **everything) -> tuple[list[Tensor], DRTCache]:
    """The last logits of each slice, and the cache after the last one."""
    cache, logits, start = DRTCache(model.config, DeviceStore(page_size=3)), [], 0
    for size in sizes:
        part = slice(start, start + size)
        out = model(
            ids[:, part],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            chunk_ends=ends[:, part],
            attention_mask=mask[:, part],
            **everything,
        )
        logits.append(out.logits[:, -keep:])
        start += size
    return logits, cache


def state(cache: DRTCache) -> list[Tensor]:
    """Every tensor of a cache that later passes may look at."""
    tensors = [cache.open_states, cache.open_lengths, cache.closed_counts, cache.store.counts]
    for layer in cache.layers:
        slots = layer.keys.shape[1]
        valid = torch.arange(slots) >= slots - (slots if layer.held is None else layer.held.unsqueeze(1))
        tensors += [torch.where(valid[..., None, None], held, 0) for held in (layer.keys, layer.values)]
    for selection in cache.selections:
        if selection is not None:
            tensors += selection
    if cache.store.counts.numel():
        everything = torch.arange(int(cache.store.counts.min())).repeat(2, 1, 1)
        tensors += [*cache.store.gather(everything), *cache.store.landmark_blocks()]
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_the_end_alone_gives_the_same_logits_and_cache(make_model, ids, rule, sizes, ragged):
    model = make_model(**rule).double()
    ends, mask = torch.zeros(ids.shape, dtype=torch.bool), torch.ones_like(ids)
    if ragged:  # with chunks that close early, in the end as `generate` does it
        ends = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.2
        ends[:, 149] = True
        mask[1, :90] = 0
    keep = 1 + len(sizes) % 2
    # A record of what is retrieved is wanted of all chunks, so there the upper decoder runs over everything.
    expected, whole = read(model, ids, sizes, ends, mask, keep, output_retrieval=True)
    found, cache = read(model, ids, sizes, ends, mask, keep)
    for end, ours, theirs in zip(accumulate(sizes), found, expected, strict=True):
        text = mask[:, max(end - keep, 0) : end][:, -ours.shape[1] :].bool()  # nothing follows from padding
        torch.testing.assert_close(ours[text], theirs[text], **TOLERANCE)
    for ours, theirs in zip(state(cache), state(whole), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for column in range(150, 156):
        step = {"input_ids": ids[:, column : column + 1], "use_cache": True, "logits_to_keep": 1}
        ours, theirs = (model(**step, past_key_values=held).logits for held in (cache, whole))
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def positions_run(model, ids, **options) -> set[int]:
    """How many positions the upper layers see in a pass."""
    seen: set[int] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[1]))
        for layer in model.model.upper_layers
    ]
    model(ids, **options)
    for hook in hooks:
        hook.remove()
    return seen


def test_how_much_runs(make_model, ids):
    model = make_model()
    everything = 156 + 156 // 7
    with torch.no_grad():
        assert upper_reach(model.config, 1) == 2 + 2 * 9
        assert positions_run(model, ids, use_cache=True, logits_to_keep=1) == {20}
        assert positions_run(model, ids, use_cache=True, logits_to_keep=4) == {26}
        for options in (
            {"use_cache": True},
            {"use_cache": False, "logits_to_keep": 1},
            {"use_cache": True, "logits_to_keep": torch.tensor([3])},
            {"use_cache": True, "logits_to_keep": 1, "output_retrieval": True},
        ):
            assert positions_run(model, ids, **options) == {everything}
    assert positions_run(model, ids, use_cache=True, logits_to_keep=1) == {everything}  # with a gradient


@torch.no_grad()
def test_only_the_end_scores_landmarks(make_model, ids):
    model, scored = make_model(), []
    model.model.retrievers[0].register_forward_pre_hook(lambda _, inputs: scored.append(inputs[0].shape[1]))
    for _ in range(2):
        model(ids, use_cache=True, logits_to_keep=1)
    assert max(scored) <= 20 // 8 + 1
    model(ids, use_cache=True)
    assert scored[-1] == 156 // 7


@pytest.mark.parametrize("slice_size", [None, 60])
def test_generate_reads_that_way(make_model, ids, slice_size):
    model, seen = make_model(), set()
    model.model.upper_layers[0].register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[1]))
    model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=slice_size)
    assert max(seen) == 20


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_some_columns_of_a_training_step(make_model, ids, rule):
    """Their logits and gradients are those of a whole pass; the last layer's MLP runs at no other position."""
    model, columns = make_model(**rule).double(), torch.tensor([0, 5, 6, 7, 8, 90, 155])
    ends = torch.zeros_like(ids, dtype=torch.bool)
    ends[1, 11] = True
    results, widths = [], []
    if rule.get("num_upper_layers", 2):
        model.model.upper_layers[-1].mlp.register_forward_pre_hook(
            lambda _, inputs: widths.append(inputs[0].shape[1])
        )
    for keep in (columns, 0):
        logits = model(ids, chunk_ends=ends, use_cache=False, logits_to_keep=keep).logits
        logits = logits if keep is columns else logits[:, columns]
        gradients = torch.autograd.grad(logits.sin().sum(), list(model.parameters()), allow_unused=True)
        results.append([logits, *gradients])
    for kept, whole in zip(*results, strict=True):
        torch.testing.assert_close(kept, whole, **TOLERANCE)
    assert widths == ([len(columns), ids.shape[1]] if rule.get("num_upper_layers", 2) else [])
