"""`generate`: every way to decode gives what passes over the whole text give, and a prompt closes its chunk."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from drt.memory import DeviceStore, HostStore
from drt.models.drt import DRTCache, DRTForCausalLM

NEW = 9  # more than a chunk of the small model
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
RULES = [{}, {"landmark_predicts": False}, {"position_embedding": "rope"}, {"retrieval": False}]


def close_after(ids: Tensor, *lengths: int) -> Tensor:
    """The chunk ends of prompts that end after so many tokens."""
    ends = torch.zeros(ids.shape, dtype=torch.bool)
    for length in lengths:
        ends[:, length - 1] = True
    return ends


def next_log_probs(model: DRTForCausalLM, ids: Tensor, *prompts: int) -> Tensor:
    """(B, V) log-probabilities of the next token, from one pass over everything without a cache."""
    logits = model(ids, use_cache=False, chunk_ends=close_after(ids, *prompts)).logits[:, -1]
    return logits.float().log_softmax(-1)


def greedy_by_hand(model: DRTForCausalLM, ids: Tensor, *prompts: int) -> Tensor:
    for _ in range(NEW):
        ids = torch.cat([ids, next_log_probs(model, ids, *prompts).argmax(-1, keepdim=True)], 1)
    return ids


def beam_search_by_hand(model: DRTForCausalLM, prompt: Tensor, beams: int) -> tuple[Tensor, Tensor]:
    """The best sequences and the sums of their log-probabilities, best first; for one prompt, no end token."""
    sequences, sums = prompt, torch.zeros(1)
    for _ in range(NEW):
        total = sums.unsqueeze(1) + next_log_probs(model, sequences, prompt.shape[1])
        sums, flat = total.flatten().topk(beams)
        parent, token = flat // total.shape[1], flat % total.shape[1]
        sequences = torch.cat([sequences[parent], token.unsqueeze(1)], 1)
    return sequences, sums


def unsure(model: DRTForCausalLM) -> DRTForCausalLM:
    """The model with flatter logits, so that what looks worse at first may be better in the end."""
    model.model.norm.weight.mul_(0.1)
    return model


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt[0]
        mask[row, longest - prompt.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def prompts(ids: Tensor) -> list[Tensor]:
    return [ids[:1], ids[1:, :14], ids[1:, 20:21], ids[:1, 5:35]]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [1, 7, 20, 61])
@torch.no_grad()
def test_greedy_is_the_best_token_of_each_pass(make_model, ids, rule, length):
    model = make_model(**rule)
    prompt = ids[:, :length]
    expected = greedy_by_hand(model, prompt, length)
    assert torch.equal(model.generate(prompt, **GREEDY), expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **GREEDY), expected)


@torch.no_grad()
def test_the_prompt_closes_its_chunk(make_model, ids):
    """Without that the small model would say something else."""
    model = make_model()
    assert not torch.equal(model.generate(ids, **GREEDY), greedy_by_hand(model, ids))


@pytest.mark.parametrize("where", ["argument", "generation_config", "own generation_config", "config"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_close_prompt_is_one_switch(make_model, ids, where, use_cache):
    """Off, `generate` is the function that `forward` is."""
    model = make_model(close_prompt=where != "config")
    settings: dict[str, object] = {**GREEDY, "use_cache": use_cache}
    assert model.generation_config.close_prompt is (where != "config")
    if where == "argument":
        settings["close_prompt"] = False
    elif where == "generation_config":
        model.generation_config.close_prompt = False
    elif where == "own generation_config":
        settings = {"generation_config": GenerationConfig(**settings, close_prompt=False)}
    assert torch.equal(model.generate(ids, **settings), greedy_by_hand(model, ids))
    if where == "config":
        closed = greedy_by_hand(model, ids, ids.shape[1])
        assert torch.equal(model.generate(ids, close_prompt=True, **settings), closed)


@torch.no_grad()
def test_close_prompt_is_saved_with_the_model(make_model, ids, tmp_path):
    model = make_model(close_prompt=False)
    model.save_pretrained(tmp_path)
    loaded = DRTForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.close_prompt, loaded.generation_config.close_prompt) == (False, False)
    (tmp_path / "generation_config.json").unlink()  # the configuration is its default
    loaded = DRTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, **GREEDY), greedy_by_hand(model, ids))
    closed = greedy_by_hand(model, ids, ids.shape[1])
    assert torch.equal(loaded.generate(ids, close_prompt=True, **GREEDY), closed)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("whole_text", [True, False], ids=["whole text", "new tokens only"])
@torch.no_grad()
def test_a_call_that_goes_on_with_an_answer_closes_nothing(make_model, prompts, rule, whole_text):
    model = make_model(**rule)
    ragged = left_padded(prompts)
    expected = model.generate(**ragged, **GREEDY)
    text, mask, cache = ragged["input_ids"], ragged["attention_mask"], None
    for count in (1, 1, 3, NEW - 5):
        said = model.generate(
            text if whole_text or cache is None else text[:, -1:],
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
        )
        cache, new = said.past_key_values, said.sequences[:, -count:]
        text = torch.cat([text, new], 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(text, expected)


@torch.no_grad()
def test_text_read_after_an_answer_is_a_prompt_again(make_model, ids):
    model = make_model()
    cache = model.generate(ids[:, :20], return_dict_in_generate=True, **GREEDY).past_key_values
    first = model.generate(ids[:, :20], **GREEDY)
    text = torch.cat([first, ids[:, 20:40]], 1)
    model(text[:, cache.get_seq_length() : -1], past_key_values=cache)
    answer = model.generate(text, past_key_values=cache, **GREEDY)
    assert torch.equal(answer, greedy_by_hand(model, text, 20, text.shape[1]))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_a_ragged_batch_says_what_each_prompt_says_alone(make_model, prompts, rule, use_cache):
    model = make_model(**rule)
    together = model.generate(**left_padded(prompts), use_cache=use_cache, **GREEDY)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[-NEW:], model.generate(prompt, **GREEDY)[0, -NEW:])


@torch.no_grad()
def test_rows_that_end_early_do_not_disturb_the_others(make_model, prompts):
    model = make_model()
    alone = [model.generate(prompt, **GREEDY)[0, -NEW:] for prompt in prompts]
    end = int(alone[0][2])
    together = model.generate(**left_padded(prompts), eos_token_id=end, **GREEDY)[:, -NEW:]
    for row, expected in zip(together, alone, strict=True):
        ends = (expected == end).nonzero()
        said = int(ends[0]) + 1 if len(ends) else NEW
        assert torch.equal(row[:said], expected[:said])
        assert not row[said:].any()  # padding


@pytest.mark.parametrize("size", [1, 4, 7, 30, 100])
@torch.no_grad()
def test_prefill_in_slices(make_model, ids, prompts, size):
    model = make_model()
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prefill_chunk_size=size, **GREEDY), expected)
    ragged = left_padded(prompts)
    expected = model.generate(**ragged, **GREEDY)
    assert torch.equal(model.generate(**ragged, prefill_chunk_size=size, **GREEDY), expected)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@torch.no_grad()
def test_a_long_prompt_is_read_in_slices_by_default(make_model, ids, monkeypatch, more):
    whole = make_model().generate(ids, **GREEDY, **more)
    monkeypatch.setattr("drt.models.common.generation.PREFILL_CHUNK_SIZE", 16)
    model = make_model()
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(model.generate(ids, **GREEDY, **more), whole)
    assert lengths[:5] == ([16, 16, 16, 13, 1] if "use_cache" not in more else [61, 62, 63, 64, 65])


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_beam_search(make_model, ids, use_cache):
    model = unsure(make_model())
    gains = []
    for prompt in (ids[:1, :20], ids[1:, :45], ids[1:, :8]):
        sequences, sums = beam_search_by_hand(model, prompt, beams=3)
        found = model.generate(
            prompt,
            num_beams=3,
            num_return_sequences=3,
            use_cache=use_cache,
            output_scores=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
        assert torch.equal(found.sequences, sequences)
        torch.testing.assert_close(found.sequences_scores * NEW, sums, rtol=1e-4, atol=1e-4)
        greedy = log_probability(model, model.generate(prompt, **GREEDY), prompt.shape[1])
        gains.append(float(sums[0]) - greedy)
    assert min(gains) > -1e-3
    assert max(gains) > 0.01, "a search that greedy decoding could replace tests little"


def log_probability(model: DRTForCausalLM, sequence: Tensor, prompt: int) -> float:
    """Of what follows the prompt in (1, L)."""
    logits = model(sequence, use_cache=False, chunk_ends=close_after(sequence, prompt)).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, sequence[:, 1:, None])
    return float(chosen[:, prompt - 1 :].sum())


@torch.no_grad()
def test_beam_search_over_a_ragged_batch(make_model, prompts):
    model = unsure(make_model())
    together = model.generate(**left_padded(prompts), num_beams=3, **GREEDY)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[-NEW:], model.generate(prompt, num_beams=3, **GREEDY)[0, -NEW:])


@torch.no_grad()
def test_sampling_follows_the_seed(make_model, ids):
    model = make_model()
    settings = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3, "temperature": 1.5}

    def sample(seed: int, **more: object) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, **settings, **more)

    first = sample(1)
    assert first.shape == (6, ids.shape[1] + NEW)
    assert torch.equal(first[:, : ids.shape[1]], ids.repeat_interleave(3, 0))
    assert len({tuple(row) for row in first[:, ids.shape[1] :].tolist()}) > 2
    assert torch.equal(sample(1), first)
    assert torch.equal(sample(1, use_cache=False), first)
    assert not torch.equal(sample(2), first)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("lengths", [(20, 5), (7, 1), (15, 13), (1, 30)], ids=str)
@pytest.mark.parametrize("whole_text", [True, False], ids=["whole text", "new tokens only"])
@torch.no_grad()
def test_a_further_turn_on_a_returned_cache(make_model, ids, rule, lengths, whole_text):
    """The second answer is that of one pass in which both prompts close their chunks."""
    model = make_model(**rule)
    first, second = lengths
    turn = model.generate(ids[:, :first], return_dict_in_generate=True, **GREEDY)
    assert isinstance(turn.past_key_values, DRTCache)
    assert turn.past_key_values.get_seq_length() == first + NEW - 1  # nobody has read the last token yet
    text = torch.cat([turn.sequences, ids[:, first : first + second]], 1)
    asked = text if whole_text else text[:, first + NEW - 1 :]
    answer = model.generate(
        asked,
        attention_mask=torch.ones_like(text),
        past_key_values=turn.past_key_values,
        **GREEDY,
    )
    expected = greedy_by_hand(model, text, first, text.shape[1])
    assert torch.equal(answer[:, -NEW:], expected[:, -NEW:])


@torch.no_grad()
def test_a_further_turn_of_a_ragged_batch(make_model, prompts, ids):
    model = make_model()
    ragged = left_padded(prompts)
    turn = model.generate(**ragged, return_dict_in_generate=True, **GREEDY)
    more = ids[:, :12].repeat(2, 1)
    text = torch.cat([turn.sequences, more], 1)
    mask = torch.cat([ragged["attention_mask"], torch.ones(len(prompts), NEW + 12, dtype=torch.long)], 1)
    together = model.generate(
        text, attention_mask=mask, past_key_values=turn.past_key_values, prefill_chunk_size=5, **GREEDY
    )
    for row, prompt in enumerate(prompts):
        alone = torch.cat([prompt[0], text[row, -NEW - 12 :]]).unsqueeze(0)
        expected = greedy_by_hand(model, alone, prompt.shape[1], alone.shape[1])
        assert torch.equal(together[row, -NEW:], expected[0, -NEW:])


@torch.no_grad()
def test_beams_over_a_document_that_was_read_once(make_model, ids):
    model = unsure(make_model())
    cache = DRTCache(model.config, DeviceStore(page_size=3))
    model(ids[:1, :40], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(3)
    answer = model.generate(ids[:1], past_key_values=cache, num_beams=3, **GREEDY)
    assert torch.equal(answer, model.generate(ids[:1], num_beams=3, **GREEDY))


@torch.no_grad()
def test_chunk_ends_of_the_user_hold(make_model, ids):
    model = make_model()
    ends = close_after(ids, 3, 31)
    expected = greedy_by_hand(model, ids, 3, 31, ids.shape[1])
    assert not torch.equal(expected, greedy_by_hand(model, ids, ids.shape[1]))
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 8}):
        assert torch.equal(model.generate(ids, chunk_ends=ends, **GREEDY, **more), expected)


@torch.no_grad()
def test_what_a_chunk_memory_cannot_do_is_refused(make_model, ids):
    model = make_model()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids[:1], assistant_model=make_model(), **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="'bm25' reads token ids: input_ids is required, got inputs_embeds"):
        make_model(retriever="bm25", num_groups=1, learned_temperature=False).generate(
            inputs_embeds=model.get_input_embeddings()(ids), **GREEDY
        )
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"cannot be cropped \(asked for -2\)"):
        cache.crop(-2)


@torch.no_grad()
def test_other_caches_are_refused(make_model, ids):
    model = make_model()
    other = DynamicCache()
    for call in (model, model.model):
        with pytest.raises(ValueError, match="past_key_values must be a DRTCache, got DynamicCache"):
            call(ids, past_key_values=other, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values must be a DRTCache, got DynamicCache"):
        model.generate(ids, past_key_values=other, **GREEDY)
    with pytest.raises(ValueError, match="cache_implementation must be None, got 'static'"):
        model.generate(ids, generation_config=GenerationConfig(cache_implementation="static", **GREEDY))


@torch.no_grad()
def test_a_cache_that_has_read_the_whole_prompt_is_refused(make_model, ids):
    model = make_model()
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"must go on after the 61 tokens .* got 61 tokens in all"):
        model.generate(ids, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("rule", [{"retrieval": False}, {"landmark_predicts": False}], ids=str)
@torch.no_grad()
def test_beam_search_under_other_rules(make_model, ids, rule):
    model = unsure(make_model(**rule))
    sequences, _ = beam_search_by_hand(model, ids[:1, :20], beams=3)
    assert torch.equal(model.generate(ids[:1, :20], num_beams=3, **GREEDY), sequences[:1])


@torch.no_grad()
def test_rows_of_a_cache_without_closed_chunks_can_be_repeated(make_model, ids):
    model = make_model()
    cache = model(ids[:1, :3], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    more = model(ids[:, 3:20], past_key_values=cache).logits
    whole = model(torch.cat([ids[:1, :3].repeat(2, 1), ids[:, 3:20]], 1), use_cache=False).logits
    torch.testing.assert_close(more, whole[:, 3:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_step_copies_the_mask_of_the_whole_text(make_model, ids, monkeypatch):
    """At a million tokens those copies would cost more than the model."""
    model = make_model()
    shapes = []
    forward = model.forward

    def watch(*args, attention_mask=None, position_ids=None, **kwargs):
        shapes.append([None if t is None else tuple(t.shape) for t in (attention_mask, position_ids)])
        return forward(*args, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    watch.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", watch)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert len(shapes) == 4
    assert all(later == [None, None] for later in shapes[1:])


@pytest.mark.parametrize("store_type", [DeviceStore, HostStore])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_what_inference_mode_has_read_is_gone_on_with(make_model, ids, store_type, rows):
    """Also where pages were copied there, for the second row."""
    model, prompt = make_model(), ids[:1].repeat(rows, 1)
    expected = model.generate(prompt, **GREEDY)
    with torch.inference_mode():
        cache = DRTCache(model.config, store_type(page_size=20, dtype="float32"))
        model(ids[:1, :20], past_key_values=cache)
        cache.batch_repeat_interleave(rows)
        model(prompt[:, 20:40], past_key_values=cache)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("rule", RULES, ids=str)
@torch.no_grad()
def test_slices_that_hold_nothing_but_padding(make_model, prompts, rule):
    """They leave no trace: what follows is what it is without them."""
    model, ragged = make_model(**rule), left_padded(prompts)
    expected = model.generate(**ragged, **GREEDY)[:, -NEW:]
    padded = {name: torch.nn.functional.pad(tensor, (9, 0)) for name, tensor in ragged.items()}
    for size in (1, 4, 100):
        found = model.generate(**padded, prefill_chunk_size=size, **GREEDY)[:, -NEW:]
        assert torch.equal(found, expected)
