"""The architecture reproduces numbers that the paper's authors' published code computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from drt.models.drt import DRTForCausalLM
from drt.models.drt.convert import config_from_authors, convert_state_dict

DATA = Path(__file__).parents[2] / "data"
SETTINGS = json.loads((DATA / "drt_x1.json").read_text())
CHUNK_ID = SETTINGS["chunk_id"]


@pytest.fixture(scope="module")
def oracle() -> dict[str, torch.Tensor]:
    return load_file(DATA / "drt_x1.safetensors")


def build(oracle: dict[str, torch.Tensor], **changes: object) -> DRTForCausalLM:
    config = config_from_authors(SETTINGS)
    for name, value in changes.items():
        setattr(config, name, value)
    model = DRTForCausalLM(config)
    parameters = {name.removeprefix("param."): t for name, t in oracle.items() if name.startswith("param.")}
    missing, unexpected = model.load_state_dict(
        convert_state_dict(parameters, config, CHUNK_ID), strict=False
    )
    assert not missing
    assert not unexpected
    return model.eval()


def logits_error(model: DRTForCausalLM, oracle: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((model(oracle["input_ids"]).logits - oracle["logits"]).abs().max())


def test_logits_loss_and_retrieval(oracle):
    model = build(oracle)
    out = model(oracle["input_ids"], labels=oracle["input_ids"], output_retrieval=True)
    assert (out.logits - oracle["logits"]).abs().max() < 1e-4
    assert abs(float(out.loss.detach()) - float(oracle["loss"])) < 1e-5
    weights = out.chunk_weights[0][:, :5]
    assert (weights - oracle["retrieval.0.weights"]).abs().max() < 1e-5
    selected = oracle["retrieval.0.weights"] > 0
    assert selected.any()
    assert torch.equal(out.chunk_indices[0][:, :5][selected], oracle["retrieval.0.indices"][:, :5][selected])


def test_every_gradient(oracle):
    model = build(oracle)
    model(oracle["input_ids"], labels=oracle["input_ids"]).loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours["model.embed_tokens.weight"] = ours["model.embed_tokens.weight"].clone()
    ours["model.embed_tokens.weight"][CHUNK_ID] += ours["model.landmark_embedding"]
    theirs = {name.removeprefix("grad."): t for name, t in oracle.items() if name.startswith("grad.")}
    theirs = convert_state_dict(theirs, model.config, CHUNK_ID)
    compared = 0
    for name, expected in theirs.items():
        if name in ("model.landmark_embedding", "lm_head.weight"):
            continue
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < 1e-3, f"{name}: {error:.2e}"
        compared += 1
    assert compared == len(ours) - 1


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 40},
        {"sliding_window": 42},
        {"sink": False},
        {"landmark_predicts": True},
        {"retrieval_top_k": 1},
        {"position_embedding": "rope"},
        {"encoder_rms_norm_eps": 1e-3},
        {"rms_norm_eps": 1e-3},
    ],
)
def test_another_rule_fails(oracle, changes):
    assert logits_error(build(oracle, **changes), oracle) > 1e-4


def test_another_slope_fails(oracle):
    model = build(oracle)
    for layer in model.model.upper_layers:
        layer.window_attention.alibi_slopes[0] *= 1.05
    assert logits_error(model, oracle) > 1e-4


def test_another_residual_rule_fails(oracle):
    """If the residual carried what was read from chunks, the logits would differ."""
    model = build(oracle)
    for layer in model.model.upper_layers:
        attention = layer.grouped_cross_attention

        def informed_residual(
            hidden_states, memory, index, inverse, state, kept, layer=layer, attention=attention
        ):
            hidden_states = hidden_states + layer.window_attention(layer.attention_norm(hidden_states), state)
            if kept is not None:
                hidden_states = hidden_states.flatten(0, 1)[kept]
            hidden_states = hidden_states + attention(hidden_states, memory.wait(), index, inverse)
            return hidden_states + layer.mlp(layer.mlp_norm(hidden_states))

        layer.forward = informed_residual
    assert logits_error(model, oracle) > 1e-4


def test_loss_is_the_mean_over_all_but_the_last_position(oracle):
    logits, ids = oracle["logits"], oracle["input_ids"]
    mean = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(mean) - float(oracle["loss"])) < 1e-5
