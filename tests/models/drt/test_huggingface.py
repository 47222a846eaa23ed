"""A model of the library in every respect: saving and loading, Auto classes, training switches, PEFT, lm-eval."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, ByT5Tokenizer, GenerationConfig

from drt.models.drt import DRTConfig, DRTForCausalLM, DRTModel
from drt.ops.window_attention import alibi_slopes


def loss_and_gradients(model: DRTForCausalLM, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one training step."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(
    actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("position", ["alibi", "rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_saved_and_loaded_again(make_model, ids, tmp_path, position, dtype):
    model = make_model(position_embedding=position, num_attention_heads=4).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = DRTForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training
    for module in loaded.modules():
        if isinstance(slopes := getattr(module, "alibi_slopes", None), Tensor):
            torch.testing.assert_close(slopes.float(), alibi_slopes(4), rtol=1e-2, atol=0)


@pytest.mark.parametrize("changes", [{"num_attention_heads": 8}, {"num_attention_heads": 1}], ids=str)
def test_slopes_of_a_loaded_model_are_those_of_its_heads(make_model, tmp_path, changes):
    make_model(**changes, num_key_value_heads=1).save_pretrained(tmp_path)
    loaded = DRTForCausalLM.from_pretrained(tmp_path)
    for layer in [*loaded.model.lower_layers, *loaded.model.upper_layers]:
        assert torch.equal(layer.window_attention.alibi_slopes, alibi_slopes(changes["num_attention_heads"]))


def test_auto_classes(make_model, ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DRTConfig
    assert config.to_diff_dict() == model.config.to_diff_dict()
    causal, base = AutoModelForCausalLM.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert (type(causal), type(base)) == (DRTForCausalLM, DRTModel)
    with torch.no_grad():
        assert torch.equal(causal(ids).logits, model(ids).logits)
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoModelForCausalLM.from_config(config)) is DRTForCausalLM


def test_what_a_folder_holds(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_drt_lm.py",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "drt"
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored, "tied weights are stored once"
    assert not [name for name in stored if "slopes" in name]
    assert stored.keys() == dict(model.named_parameters()).keys()


def test_head_and_embedding_are_tied(make_model, tmp_path):
    model = make_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = DRTForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.resize_token_embeddings(53)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded(torch.tensor([[52]])).logits.shape == (1, 1, 53)


def test_untied_head_is_stored(make_model, ids, tmp_path):
    model = make_model(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = DRTForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_a_fresh_model_predicts_nothing(ids):
    """The weights of a new model are small: its loss is that of guessing."""
    model = DRTForCausalLM(
        DRTConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=64,
            num_attention_heads=4,
            num_lower_layers=1,
            num_upper_layers=1,
            chunk_size=7,
            sliding_window=8,
        )
    )
    assert abs(float(model(ids, labels=ids).loss.detach()) - float(torch.tensor(50.0).log())) < 0.1
    assert float(model.model.landmark_embedding.detach().std()) == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize(
    "changes", [{}, {"landmark_predicts": False, "retrieval_top_k": 3}, {"num_upper_layers": [1, 2]}], ids=str
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(make_model, ids, changes):
    model = make_model(**changes).train()
    plain = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable()
    calls = []
    handle = model.model.upper_layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same_step(loss_and_gradients(model, ids), plain)
    handle.remove()
    assert len(calls) == 2, "the layer runs again in the backward pass"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)
def test_compiled_training_step(make_model, ids):
    model = make_model(num_groups=1, num_upper_layers=1).train()
    loss, gradients = loss_and_gradients(model, ids)
    torch._dynamo.reset()  # what other tests compiled
    compiled = torch.compile(model, backend="aot_eager")
    expected = loss, {f"_orig_mod.{name}": gradient for name, gradient in gradients.items()}
    for _ in range(2):
        assert_same_step(loss_and_gradients(compiled, ids), expected)


def test_bfloat16_training_step_is_near_float32(make_model, ids):
    exact, gradients = loss_and_gradients(
        make_model(retrieval_top_k=20), ids
    )  # all chunks: no selection to tip over
    rough, rough_gradients = loss_and_gradients(make_model(retrieval_top_k=20).bfloat16(), ids)
    assert rough.dtype == torch.float32
    assert abs(float(rough) - float(exact)) < 0.02 * float(exact)
    for name, gradient in gradients.items():
        assert rough_gradients[name].dtype == torch.bfloat16
        cosine = torch.cosine_similarity(rough_gradients[name].float().flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.95, f"{name}: {float(cosine):.3f}"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(make_model, ids):
    peft = pytest.importorskip("peft")
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids).logits
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj", "chunk_v_proj"]),
    )
    with torch.no_grad():
        assert torch.equal(wrapped(ids).logits, logits), "LoRA starts at nothing"
    trained = [(name, p) for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name, _ in trained)
    optimizer = torch.optim.SGD([p for _, p in trained], lr=0.05)
    losses = []
    for _ in range(3):
        loss = wrapped(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    generated = wrapped.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert generated.shape == (2, ids.shape[1] + 2)
    unloaded = wrapped.unload()
    for name, parameter in unloaded.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_generation_defaults_come_from_the_config(make_model):
    generation = make_model(eos_token_id=3).generation_config
    assert isinstance(generation, GenerationConfig)
    assert (generation.pad_token_id, generation.eos_token_id) == (0, 3)


def test_lm_eval_runs_the_live_model(make_model):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    tokenizer = ByT5Tokenizer(extra_ids=0)
    model = make_model(vocab_size=len(tokenizer), eos_token_id=1)
    harness = huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=256, batch_size=2, add_bos_token=False
    )
    pairs = [
        ("The grass is", " green and long."),
        ("Once upon a time, in a land far away,", " there"),
        ("a", "b"),
    ]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (context, continuation), (score, greedy) in zip(pairs, harness.loglikelihood(requests), strict=True):
        expected, expected_greedy = score_by_hand(model, tokenizer, context, continuation)
        assert score == pytest.approx(expected, rel=1e-4)
        assert greedy == expected_greedy
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (context, settings), i) for i, (context, _) in enumerate(pairs)
    ]
    for (context, _), text in zip(pairs, harness.generate_until(requests), strict=True):
        prompt = torch.tensor([tokenizer.encode(context, add_special_tokens=False)])
        said = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert text == tokenizer.decode(said, skip_special_tokens=True).split("\n")[0]


@torch.no_grad()
def score_by_hand(
    model: DRTForCausalLM, tokenizer: ByT5Tokenizer, context: str, continuation: str
) -> tuple[float, bool]:
    """Log-probability of the continuation's bytes, and whether each was the most probable."""
    context_ids, continuation_ids = (
        tokenizer.encode(text, add_special_tokens=False) for text in (context, continuation)
    )
    ids = torch.tensor([context_ids + continuation_ids])
    log_probs = model(ids).logits[0, len(context_ids) - 1 : -1].log_softmax(-1)
    chosen = log_probs.gather(-1, torch.tensor(continuation_ids).unsqueeze(-1))
    return float(chosen.sum()), bool((log_probs.argmax(-1) == torch.tensor(continuation_ids)).all())
