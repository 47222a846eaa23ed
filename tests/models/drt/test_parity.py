"""The architecture reproduces numbers that the paper's authors' published code computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from drt.models.drt import DRTForCausalLM
from drt.models.drt.convert import config_from_authors, convert_state_dict

DATA = Path(__file__).parents[2] / "data"


class Oracle(NamedTuple):
    """The authors' configuration of a model, and its parameters, gradients and results by name."""

    settings: dict[str, Any]
    numbers: dict[str, torch.Tensor]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        held = self.numbers.items()
        return {name.removeprefix(prefix): x.float() for name, x in held if name.startswith(prefix)}


@pytest.fixture(scope="module", params=["drt_x1", "drt_unequal"])
def oracle(request) -> Oracle:
    """One group of two layers, and groups of one and of two, whose parameters are kept in float16."""
    numbers = load_file(DATA / f"{request.param}.safetensors")
    return Oracle(
        json.loads((DATA / f"{request.param}.json").read_text()),
        numbers | {"input_ids": numbers["input_ids"].long()},
    )


def build(oracle: Oracle, **changes: object) -> DRTForCausalLM:
    config = config_from_authors(oracle.settings)
    parameters = convert_state_dict(oracle.part("param."), config, oracle.settings["chunk_id"])
    for name, value in changes.items():
        setattr(config, name, value)
    model = DRTForCausalLM(config)
    missing, unexpected = model.load_state_dict(parameters, strict=False)
    assert not missing
    assert not unexpected
    return model.eval()


def logits_error(model: DRTForCausalLM, oracle: Oracle) -> float:
    with torch.no_grad():
        return float((model(oracle.numbers["input_ids"]).logits - oracle.numbers["logits"]).abs().max())


def test_logits_loss_and_retrieval(oracle):
    model, numbers = build(oracle), oracle.numbers
    out = model(numbers["input_ids"], labels=numbers["input_ids"], output_retrieval=True)
    assert (out.logits - numbers["logits"]).abs().max() < 1e-4
    assert abs(float(out.loss.detach()) - float(numbers["loss"])) < 1e-5
    assert len(out.chunk_weights) == len(oracle.settings["decoder_layers"]) - 1
    for group, (indices, weights) in enumerate(zip(out.chunk_indices, out.chunk_weights, strict=True)):
        expected = numbers[f"retrieval.{group}.weights"]
        assert (weights[:, :5] - expected).abs().max() < 1e-5
        selected = expected > 0
        assert selected.any()
        assert torch.equal(
            indices[:, :5][selected], numbers[f"retrieval.{group}.indices"][:, :5][selected].long()
        )


def test_every_gradient(oracle):
    model, ids, chunk_id = build(oracle), oracle.numbers["input_ids"], oracle.settings["chunk_id"]
    model(ids, labels=ids).loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours["model.embed_tokens.weight"] = ours["model.embed_tokens.weight"].clone()
    ours["model.embed_tokens.weight"][chunk_id] += ours["model.landmark_embedding"]
    theirs = convert_state_dict(oracle.part("grad."), model.config, chunk_id)
    compared = 0
    for name, expected in theirs.items():
        if name in ("model.landmark_embedding", "lm_head.weight"):
            continue
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < 1e-3, f"{name}: {error:.2e}"
        compared += 1
    assert compared == len(ours) - 1


@pytest.mark.parametrize("oracle", ["drt_unequal"], indirect=True)
@pytest.mark.parametrize("layers", [[2, 1], [3]])
def test_other_groups_fail(oracle, layers):
    model = build(oracle)
    model.config.num_upper_layers = layers
    assert logits_error(model, oracle) > 1e-4


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
            hidden_states, index, inverse, state, kept, chunks, layer=layer, attention=attention
        ):
            hidden_states = hidden_states + layer.window_attention(layer.attention_norm(hidden_states), state)
            if kept is not None:
                hidden_states = hidden_states.flatten(0, 1)[kept]
            hidden_states = hidden_states + attention(hidden_states, chunks.wait(), index, inverse)
            return hidden_states + layer.mlp(layer.mlp_norm(hidden_states))

        layer.forward = informed_residual
    assert logits_error(model, oracle) > 1e-4


def test_loss_is_the_mean_over_all_but_the_last_position(oracle):
    logits, ids = oracle.numbers["logits"], oracle.numbers["input_ids"]
    mean = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(mean) - float(oracle.numbers["loss"])) < 1e-5
