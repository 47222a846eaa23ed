"""DRT with a retriever that is not learned: what it reads, that it decodes as one pass does, that it trains."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from drt.layers.fixed_retrievers import EmbeddingRetriever
from drt.memory import DeviceStore
from drt.models.drt import DRTCache, DRTConfig, DRTForCausalLM

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
RULES = [{}, {"landmark_predicts": False}, {"sink": False, "chunk_size": 3, "retrieval_top_k": 5}]
RETRIEVERS = ["random", "bm25", "embedding"]


def embed(chunk_ids: Tensor, chunk_lengths: Tensor) -> Tensor:
    """A bag of tokens, each with a fixed random vector."""
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(chunk_ids.shape[1]) < chunk_lengths.unsqueeze(1)
    return torch.nn.functional.normalize((table[chunk_ids] * valid.unsqueeze(-1)).sum(1), dim=-1)


@pytest.fixture
def make_fixed(make_model):
    def make(retriever: str, **changes: object) -> DRTForCausalLM:
        model = make_model(retriever=retriever, num_groups=1, learned_temperature=False, **changes)
        for module in model.modules():
            if isinstance(module, EmbeddingRetriever):
                module.embedder = embed
        return model

    return make


def read(model, ids, sizes, chunk_ends=None, attention_mask=None, keep=0):
    """Logits of every token, read in slices of the given sizes (the last one repeats)."""
    cache = DRTCache(model.config, DeviceStore(page_size=3))
    logits, start, number = [], 0, 0
    while start < ids.shape[1]:
        size = sizes[min(number, len(sizes) - 1)]
        part = slice(start, start + size)
        out = model(
            ids[:, part],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            chunk_ends=None if chunk_ends is None else chunk_ends[:, part],
            attention_mask=None if attention_mask is None else attention_mask[:, : start + size],
        )
        logits.append(out.logits)
        start += size
        number += 1
    return torch.cat(logits, 1)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("retriever", RETRIEVERS)
@pytest.mark.parametrize("sizes", [[1], [61], [9, 1, 20]], ids=str)
@torch.no_grad()
def test_slices_of_ragged_rows_equal_one_pass(make_fixed, ids, retriever, rule, sizes):
    model = make_fixed(retriever, **rule)
    ends = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.1
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    together = read(model, ids, sizes, ends, mask)
    for row, pad in enumerate([0, 17]):
        alone = model(ids[row : row + 1, pad:], use_cache=False, chunk_ends=ends[row : row + 1, pad:]).logits
        torch.testing.assert_close(together[row, pad:], alone[0], **TOLERANCE)


@pytest.mark.parametrize("retriever", RETRIEVERS)
@torch.no_grad()
def test_a_text_that_is_only_read(make_fixed, retriever):
    """The upper decoder skips what nobody asks for, the chunks there are remembered all the same."""
    ids = torch.randint(1, 50, (2, 156), generator=torch.Generator().manual_seed(1))
    model = make_fixed(retriever)
    last = read(model, ids, [70, 45, 41], keep=1)[:, -1]
    torch.testing.assert_close(last, model(ids, use_cache=False).logits[:, -1], **TOLERANCE)


@pytest.mark.parametrize("retriever", RETRIEVERS)
@torch.no_grad()
def test_generation_and_beams(make_fixed, ids, retriever):
    model = make_fixed(retriever)
    for settings in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 9, "do_sample": False} | settings
        assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("retriever", RETRIEVERS)
@torch.no_grad()
def test_the_future_is_not_seen_and_far_chunks_are(make_fixed, ids, retriever):
    model = make_fixed(retriever, retrieval_top_k=8, sliding_window=4)
    logits = model(ids, use_cache=False).logits
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 7) % 50
    torch.testing.assert_close(model(changed, use_cache=False).logits[:, :40], logits[:, :40])
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 7) % 50
    assert (model(changed, use_cache=False).logits - logits)[:, 40:].abs().max() > 1e-4


@torch.no_grad()
def test_bm25_retrieves_what_brute_force_retrieves(make_fixed, ids):
    model = make_fixed("bm25", retrieval_top_k=2)
    ids = ids % 12  # tokens that repeat
    found = model(ids, use_cache=False, output_retrieval=True).chunk_indices[0]
    for row in range(2):
        chunks = [ids[row, start : start + 7].tolist() for start in range(0, 56, 7)]
        for query, asking in enumerate(chunks):
            scores = []
            for chunk in chunks[:query]:
                tf = Counter(chunk)
                df = [sum(token in other for other in chunks[:query]) for token in asking]
                idf = [math.log(1 + (query - n + 0.5) / (n + 0.5)) for n in df]
                scores.append(sum(w * tf[t] * 2.2 / (tf[t] + 1.2) for w, t in zip(idf, asking, strict=True)))
            kept = [index for index in found[row, query].tolist() if index >= 0]
            assert [scores[index] for index in kept] == pytest.approx(sorted(scores, reverse=True)[:2])


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_every_parameter_gets_a_gradient(make_fixed, ids, retriever):
    model = make_fixed(retriever).train()
    model(ids, labels=ids).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
    assert not [n for n, _ in model.named_parameters() if "retriever" in n]


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_bfloat16_autocast_is_near_float32(make_fixed, ids, retriever):
    model = make_fixed(retriever).train()
    exact = float(model(ids, labels=ids).loss.detach())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids, labels=ids).loss
    assert abs(float(rough.detach()) - exact) < 0.02 * exact
    rough.backward()


@torch.no_grad()
def test_saved_and_loaded_again(make_fixed, ids, tmp_path):
    model = make_fixed("bm25")
    model.save_pretrained(tmp_path)
    loaded = DRTForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.retriever == "bm25"
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_what_is_refused(make_model, make_fixed, ids):
    model = make_fixed("random")
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="token ids: input_ids is required, got inputs_embeds"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="needs a text embedder"):
        make_model(retriever="embedding", num_groups=1, learned_temperature=False)(ids)
    cache = make_model(num_groups=1)(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled by a model without a fixed retriever"):
        make_fixed("bm25")(ids, past_key_values=cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retriever": "google"}, "one of learned, random, bm25, embedding, got 'google'"),
        ({"retriever": "bm25", "num_groups": 2}, "num_groups must be 1 and learned_temperature False, got 2"),
        ({"retriever": "random", "learned_temperature": True}, "got 1 and True"),
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(StrictDataclassError) as refusal:
        DRTConfig(**changes)
    assert message in f"{refusal.value} {refusal.value.__cause__}"


@pytest.mark.parametrize("retriever", ["learned", "random", "bm25", "embedding"])
@torch.no_grad()
def test_token_embeddings_can_be_resized_with_every_retriever(make_model, retriever):
    """New tokens are read, retrieved by and predicted like old ones, in one pass and in several."""
    model = make_model(retriever=retriever, num_groups=1, learned_temperature=False)
    if retriever == "embedding":
        model.model.retrievers[0].embedder = lambda ids, lengths: embed(ids % 50, lengths)
    model.resize_token_embeddings(90)
    assert model.config.vocab_size == model.vocab_size == 90
    ids = torch.randint(60, 90, (2, 61), generator=torch.Generator().manual_seed(1))
    out = model(ids, labels=ids, use_cache=False)
    assert out.logits.shape == (2, 61, 90)
    cache, parts = None, []
    for part in ids.split(20, 1):
        step = model(part, past_key_values=cache, use_cache=True)
        cache, parts = step.past_key_values, [*parts, step.logits]
    torch.testing.assert_close(torch.cat(parts, 1), out.logits, rtol=1e-4, atol=1e-3)
