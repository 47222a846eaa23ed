"""What holds for every baseline: causal, decodes as one pass does, trains, saves, is a model of the library."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}  # float64, but for angles and biases
NEW = 9
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
MODELS = [
    ("window", {}),
    ("window", {"position_embedding": "rope"}),
    ("full_attention", {}),
    ("full_attention", {"position_embedding": "alibi"}),
    ("block_recurrent", {}),
    ("block_recurrent", {"recurrent_layer": 0, "block_size": 12}),
    ("landmark", {}),
    ("landmark", {"chunk_size": 3, "local_chunks": 0, "retrieval_top_k": 4}),
]
ONE_EACH = list({name: (name, changes) for name, changes in reversed(MODELS)}.values())


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 50, (2, 61), generator=torch.Generator().manual_seed(1))


def read(model, ids, sizes, attention_mask=None, cache=None):
    """Logits of every token, read in slices of the given sizes (the last one repeats)."""
    cache = model.model.make_cache() if cache is None else cache
    logits, start = [], 0
    while start < ids.shape[1]:
        size = sizes[min(len(logits), len(sizes) - 1)]
        part = slice(start, start + size)
        out = model(
            ids[:, part],
            past_key_values=cache,
            use_cache=True,
            attention_mask=None if attention_mask is None else attention_mask[:, : start + size],
        )
        logits.append(out.logits)
        start += size
    return torch.cat(logits, 1)


@pytest.mark.parametrize(("name", "changes"), MODELS)
@torch.no_grad()
def test_the_future_is_not_seen(make_baseline, ids, name, changes):
    model = make_baseline(name, **changes)
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 7) % 50
    for mode in (model.eval(), model.train()):
        ours, other = mode(ids, use_cache=False).logits, mode(changed, use_cache=False).logits
        torch.testing.assert_close(ours[:, :40], other[:, :40])
        assert (ours[:, 40:] - other[:, 40:]).abs().max() > 0.01


@pytest.mark.parametrize(("name", "changes"), MODELS)
@pytest.mark.parametrize("sizes", [[1], [61], [5], [20, 1], [3, 17, 1, 8]], ids=str)
@torch.no_grad()
def test_slices_equal_one_pass(make_baseline, ids, name, changes, sizes):
    model = make_baseline(name, **changes)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(read(model, ids, sizes), whole, **TOLERANCE)


@pytest.mark.parametrize(("name", "changes"), MODELS)
@pytest.mark.parametrize("sizes", [[61], [1], [6], [40, 1]], ids=str)
@torch.no_grad()
def test_a_ragged_row_has_the_logits_it_has_alone(make_baseline, ids, name, changes, sizes):
    model = make_baseline(name, **changes)
    pads = [0, 17]
    mask = torch.ones_like(ids)
    mask[1, : pads[1]] = 0
    together = read(model, ids, sizes, mask)
    one_pass = model(ids, use_cache=False, attention_mask=mask).logits
    for row, pad in enumerate(pads):
        alone = model(ids[row : row + 1, pad:], use_cache=False).logits
        torch.testing.assert_close(together[row, pad:], alone[0], **TOLERANCE)
        torch.testing.assert_close(one_pass[row, pad:], alone[0], **TOLERANCE)


@pytest.mark.parametrize(("name", "changes"), ONE_EACH)
@torch.no_grad()
def test_padding_between_two_passes_is_no_text(make_baseline, ids, name, changes):
    model = make_baseline(name, **changes)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:29] = 0
    together = read(model, ids[:, :40], [20, 4, 16], mask)
    for row in (0, 1):
        text = ids[row : row + 1, :40][:, mask[row].bool()]
        alone = model(text, use_cache=False).logits[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone, **TOLERANCE)


@pytest.mark.parametrize(("name", "changes"), ONE_EACH)
@torch.no_grad()
def test_generation(make_baseline, ids, name, changes):
    model = make_baseline(name, **changes)
    expected = ids
    for _ in range(NEW):
        following = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], 1)
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 8}):
        assert torch.equal(model.generate(ids, **GREEDY, **more), expected)
    turn = model.generate(ids[:, :20], return_dict_in_generate=True, **GREEDY)
    again = torch.cat([turn.sequences, ids[:, 30:35]], 1)
    settings = GREEDY | {"attention_mask": torch.ones_like(again)}
    answer = model.generate(again, past_key_values=turn.past_key_values, **settings)
    assert torch.equal(answer, model.generate(again, use_cache=False, **settings))


@pytest.mark.parametrize(("name", "changes"), ONE_EACH)
@torch.no_grad()
def test_a_long_prompt_is_read_in_slices_by_default(make_baseline, ids, monkeypatch, name, changes):
    monkeypatch.setattr("drt.models.common.generation.PREFILL_CHUNK_SIZE", 16)
    model = make_baseline(name, **changes)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    said = model.generate(ids[:, :40], **GREEDY)
    assert lengths[:4] == [16, 16, 8, 1]
    assert torch.equal(said, model.generate(ids[:, :40], prefill_chunk_size=None, **GREEDY))


@pytest.mark.parametrize(("name", "changes"), ONE_EACH)
@torch.no_grad()
def test_ragged_generation_and_beams(make_baseline, ids, name, changes):
    model = make_baseline(name, **changes)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    for settings in (GREEDY, GREEDY | {"num_beams": 3}):
        together = model.generate(ids, attention_mask=mask, **settings)
        for row, pad in enumerate([0, 17]):
            alone = model.generate(ids[row : row + 1, pad:], use_cache=False, **settings)
            assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


@pytest.mark.parametrize(("name", "changes"), ONE_EACH)
@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_and_forgotten(make_baseline, ids, name, changes):
    model = make_baseline(name, **changes)
    rows = torch.tensor([1, 1, 0])
    cache = model.model.make_cache()
    first = read(model, ids[:, :33], [11], cache=cache)
    cache.select_rows(rows)
    expected = model(ids[rows], use_cache=False).logits[:, 33:]
    torch.testing.assert_close(read(model, ids[rows][:, 33:], [9], cache=cache), expected, **TOLERANCE)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(read(model, ids[:, :33], [11], cache=cache), first)


@pytest.mark.parametrize(("name", "changes"), MODELS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_loss_and_gradients(make_baseline, ids, name, changes):
    model = make_baseline(name, **changes).train()
    labels = ids.clone()
    labels[:, 5:9] = -100
    out = model(ids, labels=labels, chunk_ends=torch.ones_like(ids, dtype=torch.bool))
    assert out.past_key_values is None
    assert out.logits is None, "a training step makes none"
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
    assert not silent
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=labels).loss.backward()
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "changes"), MODELS)
@torch.no_grad()
def test_saved_and_loaded_by_the_auto_classes(make_baseline, ids, tmp_path, name, changes):
    model = make_baseline(name, **changes)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    causal, base = AutoModelForCausalLM.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert type(causal) is type(model)
    torch.testing.assert_close(causal(ids).logits, model(ids).logits, **TOLERANCE)
    states = (x(ids).last_hidden_state for x in (base, model.model))
    torch.testing.assert_close(*states, **TOLERANCE)
    assert causal.lm_head.weight is causal.model.embed_tokens.weight


@pytest.mark.parametrize(("name", "changes"), ONE_EACH)
def test_bfloat16_autocast_is_near_float32(make_baseline, ids, name, changes):
    model = make_baseline(name, **changes).float().train()
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids, labels=ids).loss
    assert rough.dtype == torch.float32
    assert abs(float(rough.detach()) - float(exact.detach())) < 0.02 * float(exact.detach())
    rough.backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        read(model.eval(), ids, [20, 1])


@pytest.mark.parametrize(("name", "changes"), ONE_EACH)
@torch.no_grad()
def test_what_is_refused(make_baseline, ids, name, changes):
    model = make_baseline(name, **changes)
    with pytest.raises(ValueError, match="must be a DecoderCache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match="must be a DecoderCache, got DynamicCache"):
        model.generate(ids, past_key_values=DynamicCache(), **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids[:1], assistant_model=make_baseline(name, **changes), **GREEDY)
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 50\), got 50 to 51"):
        model(torch.tensor([[50, 51]]))
    with pytest.raises(ValueError, match=r"labels must have the shape of the input, \(2, 61\), got \(2, 3\)"):
        model(ids, labels=ids[:, :3])
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, the input has 1"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="use_cache=False cannot continue"):
        model(ids, past_key_values=cache, use_cache=False)
    with pytest.raises(ValueError, match=r"cannot be cropped \(asked for -2\)"):
        cache.crop(-2)


@pytest.mark.parametrize("name", [name for name, _ in ONE_EACH])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        (
            {"num_attention_heads": 5},
            "hidden_size must be num_attention_heads x head_dim, got 768 and 5 x 153",
        ),
        ({"num_key_value_heads": 5}, "num_key_value_heads must divide num_attention_heads, got 5 and 12"),
        ({"position_embedding": "sinus"}, "got 'sinus'"),
        ({"hidden_size": "64"}, "'hidden_size' expected int"),
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(name, changes, message):
    with pytest.raises(StrictDataclassError) as refusal:
        AutoConfig.for_model(name, **changes)
    assert message in f"{refusal.value} {refusal.value.__cause__}"


@pytest.mark.parametrize("name", [name for name, _ in ONE_EACH])
def test_sizes_beyond_any_sense(name):
    sizes = AutoConfig.for_model(name).ranges
    assert {"vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size"} <= set(sizes)
    own = (
        "sliding_window",
        "chunk_size",
        "retrieval_top_k",
        "block_size",
        "num_states",
        "max_chunk_distance",
    )
    assert set(own) & set(vars(AutoConfig.for_model(name))) <= set(sizes)
    for size, (_, most) in sizes.items():
        if isinstance(most, int):
            with pytest.raises(StrictDataclassError) as refusal:
                AutoConfig.for_model(name, **{size: 10**12})
            assert size in f"{refusal.value} {refusal.value.__cause__}"


@pytest.mark.parametrize("name", [name for name, _ in ONE_EACH])
@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "unknown"}},
        {"attn_implementation": "kernels-community/any"},
        {"dtype": "nonsense"},
    ],
    ids=str,
)
def test_what_these_models_do_not_support_is_refused(name, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        AutoConfig.for_model(name, **changes)


@pytest.mark.parametrize(("name", "changes"), ONE_EACH)
@torch.no_grad()
def test_the_loss_of_a_segment_sees_what_a_given_cache_holds(make_baseline, ids, name, changes):
    model, cache = make_baseline(name, **changes), make_baseline(name, **changes).model.make_cache()
    whole = model(ids, use_cache=False).logits
    for start, stop in ((0, 30), (30, 61)):
        part = ids[:, start:stop]
        found = model(part, labels=part, past_key_values=cache).loss
        expected = F.cross_entropy(whole[:, start : stop - 1].flatten(0, 1).float(), part[:, 1:].flatten())
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("name", "changes"), ONE_EACH)
@pytest.mark.parametrize("chosen", [False, True], ids=["read", "chosen"])
@torch.no_grad()
def test_what_inference_mode_has_read_is_gone_on_with(make_baseline, ids, name, changes, chosen):
    """So much that a growing cache has room for what follows."""
    model = make_baseline(name, **changes)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    with torch.inference_mode():
        cache = model(ids[:, :55], use_cache=True).past_key_values
        if chosen:
            cache.select_rows(torch.tensor([0, 1]))
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
