"""`generate` over batches whose rows end at different times, from embeddings, and with adapters around the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

MODELS = ["drt", "window", "full_attention", "landmark", "block_recurrent"]
NEW = 12
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_baseline) -> PreTrainedModel:
    return make_baseline(request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 50, (3, 45), generator=torch.Generator().manual_seed(1))


def first_turn(model: PreTrainedModel, prompts: Tensor, mask: Tensor) -> tuple[object, int]:
    """An answer of each row, the first of which ends early; and the token that ends it."""
    free = model.generate(prompts, attention_mask=mask, **GREEDY)[:, -NEW:]
    end = next(int(token) for token in free[0, :4] if bool((free[1:, :9] != token).all(1).any()))
    said = model.generate(
        prompts, attention_mask=mask, eos_token_id=end, return_dict_in_generate=True, **GREEDY
    )
    assert (said.sequences[0, -2:] == 0).all(), "the first row must end early"
    return said, end


@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_a_second_turn_after_a_row_has_ended_early(model, ids, ragged):
    """The padding that ended rows are fed is not remembered as text."""
    prompts, more = ids[:, :25], ids[:, 25:]
    mask = torch.ones_like(prompts)
    mask[2, : 6 * ragged] = 0
    said, end = first_turn(model, prompts, mask)
    text = torch.cat([said.sequences, more], 1)
    whole = torch.cat([mask, (said.sequences[:, 25:] != 0).long(), torch.ones_like(more)], 1)
    past = said.past_key_values.get_seq_length()
    positions = (whole.cumsum(1) - 1).clamp_min(0)[:, past:]
    wanted = []
    for row in range(3):
        alone = model.generate(
            prompts[row : row + 1, mask[row].bool()], eos_token_id=end, return_dict_in_generate=True, **GREEDY
        )
        rest = torch.cat(
            [alone.sequences[:, alone.past_key_values.get_seq_length() :], more[row : row + 1]], 1
        )
        wanted.append(model(rest, past_key_values=alone.past_key_values).logits[0, -20:])
    together = model(
        text[:, past:], attention_mask=whole, position_ids=positions, past_key_values=said.past_key_values
    )
    for row in range(3):
        torch.testing.assert_close(together.logits[row, -20:], wanted[row], **TOLERANCE)


@torch.no_grad()
def test_a_second_answer_after_a_row_has_ended_early(model, ids):
    prompts, more = ids[:, :25], ids[:, 25:31]
    mask = torch.ones_like(prompts)
    said, end = first_turn(model, prompts, mask)
    text = torch.cat([said.sequences, more], 1)
    whole = torch.cat([mask, (said.sequences[:, 25:] != 0).long(), torch.ones_like(more)], 1)
    together = model.generate(text, attention_mask=whole, past_key_values=said.past_key_values, **GREEDY)
    for row in range(3):
        alone = model.generate(
            prompts[row : row + 1], eos_token_id=end, return_dict_in_generate=True, **GREEDY
        )
        asked = torch.cat([alone.sequences, more[row : row + 1]], 1)
        answer = model.generate(asked, past_key_values=alone.past_key_values, **GREEDY)
        assert torch.equal(together[row, -NEW:], answer[0, -NEW:])


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_generation_from_a_prompt_padded_on_the_right_is_refused(model, ids, use_cache):
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    with pytest.raises(ValueError, match=r'tokenizer\.padding_side = "left"'):
        model.generate(ids, attention_mask=mask, use_cache=use_cache, **GREEDY)


@torch.no_grad()
def test_generation_from_embeddings(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    embeds = model.get_input_embeddings()(ids)
    for more in ({}, {"num_beams": 2}, {"prefill_chunk_size": 10}):
        expected = model.generate(ids, attention_mask=mask, **GREEDY, **more)[:, -NEW:]
        found = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **more)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_prompt_tuning(model, ids, kind):
    """The virtual tokens come before the prompt, which still closes its chunk, and is read at once."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned = peft.get_peft_model(model.float(), config)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    tuned(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    tuned.eval()
    with torch.no_grad():
        prompt = torch.cat([tuned.get_prompt(3), model.get_input_embeddings()(ids)], 1)
        expected = model.generate(inputs_embeds=prompt, **GREEDY)
        for more in ({}, {"prefill_chunk_size": 10}, {"use_cache": False}):
            found = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, **more)
            assert torch.equal(found[:, -NEW:], expected), more
