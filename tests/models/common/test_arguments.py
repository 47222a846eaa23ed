"""What the library's callers ask of any model: given, or refused in words; in DRT and every baseline."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

MODELS = ["drt", "window", "full_attention", "landmark", "block_recurrent"]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_baseline) -> PreTrainedModel:
    return make_baseline(request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 50, (2, 45), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_hidden_states(make_baseline, ids, layers):
    for name in MODELS:
        model = make_baseline(name, num_hidden_layers=layers)
        out = model(ids, output_hidden_states=True, logits_to_keep=3)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert {tuple(states.shape) for states in out.hidden_states} == {(2, 45, 32)}
        torch.testing.assert_close(out.hidden_states[0], model.get_input_embeddings()(ids))
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1][:, -3:]), out.logits)
        torch.testing.assert_close(out.logits, model(ids, logits_to_keep=3).logits)
        assert model(ids).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(ids).hidden_states) == model.config.num_hidden_layers + 1


@torch.no_grad()
def test_hidden_states_lie_at_their_tokens(model, ids):
    """Whatever the row's padding, its documents and the passes it was read in."""
    alone = model(ids[:1], output_hidden_states=True, use_cache=False).hidden_states
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :3] = mask[0, 48:] = 0
    padded = torch.cat([ids[:, -3:], ids, ids[:, :2]], 1)
    found = model(padded, attention_mask=mask, output_hidden_states=True).hidden_states
    positions = torch.cat([torch.arange(5), torch.arange(45)])
    packed = torch.cat([ids[1:, :5], ids[:1]], 1)
    documents = model(packed, position_ids=positions, output_hidden_states=True).hidden_states
    cache, parts = None, []
    for part in ids[:1].split([20, 1, 24], 1):
        out = model(part, past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache, parts = out.past_key_values, [*parts, out.hidden_states]
    for number, states in enumerate(alone):
        torch.testing.assert_close(found[number][:1, 3:48], states)
        torch.testing.assert_close(documents[number][:, 5:], states)
        in_passes = torch.cat([part[number] for part in parts], 1)
        torch.testing.assert_close(in_passes, states, rtol=1e-6, atol=1e-6)


def test_hidden_states_are_what_the_layers_read(model, ids):
    """Not copies beside it: adding to one adds to the layer's input, with all that is made of it."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.cat([torch.arange(15), torch.arange(30)])
    for more in ({"use_cache": False}, {"attention_mask": mask}, {"position_ids": positions}):
        out = model(ids, output_hidden_states=True, **more)
        for states in out.hidden_states:
            states.retain_grad()
        out.logits.square().sum().backward()
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, **more).logits.square().sum().backward()
        real = mask.bool() if "attention_mask" in more else slice(None)
        torch.testing.assert_close(out.hidden_states[0].grad[real], embeds.grad[real])
        assert all(bool(states.grad.any()) for states in out.hidden_states)


@torch.no_grad()
def test_hidden_states_of_generate(model, ids):
    out = model.generate(
        ids, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    )
    assert [states[-1].shape[1] for states in out.hidden_states] == [45, 1, 1]


@torch.no_grad()
def test_attention_weights_are_refused(model, ids):
    for called in (model, model.model):
        with pytest.raises(ValueError, match="output_attentions=True cannot be had"):
            called(ids, output_attentions=True)
        assert called(ids, output_attentions=False)[0] is not None
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True cannot be had"):
        model(ids)


@torch.no_grad()
def test_tuples(model, ids):
    whole = model(ids, labels=ids, use_cache=False)
    parts = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert [type(part) for part in parts] == [Tensor, Tensor]
    assert torch.equal(parts[0], whole.loss)
    assert torch.equal(parts[1], whole.logits)
    states = model.model(ids, return_dict=False)
    assert torch.equal(states[0], model.model(ids).last_hidden_state)
    assert states[1] is not None
    model.config.return_dict = False
    assert torch.equal(model(ids, use_cache=False)[0], whole.logits)
    assert torch.equal(model(ids, use_cache=False, return_dict=True).logits, whole.logits)


@torch.no_grad()
def test_logits_of_chosen_positions(model, ids):
    whole = model(ids).logits
    kept = torch.tensor([[3, 4, 44], [0, 9, 20]])
    each = model(ids, logits_to_keep=kept).logits
    torch.testing.assert_close(each, whole[torch.arange(2)[:, None], kept])
    torch.testing.assert_close(model(ids, logits_to_keep=kept[0]).logits, whole[:, kept[0]])


@torch.no_grad()
def test_guidance_of_a_model_that_retrieves_nothing_is_refused(make_baseline, ids):
    for name in MODELS[1:]:
        with pytest.raises(ValueError, match=f"retrieval_targets is not supported by {name} models"):
            make_baseline(name)(ids, retrieval_targets=torch.tensor([[0, 40, 3]]))


@torch.no_grad()
def test_what_would_not_be_heeded_is_refused(model, ids):
    for called in (model, model.model):
        with pytest.raises(ValueError, match="head_mask is not supported"):
            called(ids, head_mask=torch.ones(2, 4))
        with pytest.raises(
            ValueError, match="seq_idx says where packed documents lie; expected position_ids"
        ):
            called(ids, seq_idx=torch.zeros(2, 45))
        called(ids, position_ids=torch.arange(45) % 20, seq_idx=torch.zeros(2, 45))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_of_either_kind_changes_no_gradient(model, ids, reentrant):
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of what is called
@torch.no_grad()
def test_graphs_of_whole_models_are_refused_in_words(model, ids):
    wanted = "found on the CPU for every input: compile without fullgraph=True"
    with pytest.raises(NotImplementedError, match=wanted):
        torch.export.export(model, (ids,), {"use_cache": False})
    with pytest.raises(NotImplementedError, match=wanted):
        torch.jit.trace(model, example_kwarg_inputs={"input_ids": ids})
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=wanted):
        torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False)
