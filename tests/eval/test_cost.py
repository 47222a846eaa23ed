"""The count of matrix products: against what the model's projections do, against a hand count, and its shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from drt.eval.cost import MatrixProduct, prefill_products
from drt.models.drt import DRTConfig, DRTForCausalLM

CHUNKS, CHUNK = 6, 15
SEGMENT = CHUNKS * CHUNK
POSITIONS = CHUNKS * (CHUNK + 1)


def flops(products: list[MatrixProduct], *parts: str) -> float:
    return sum(product.flops for product in products if not parts or product.part in parts)


def count_projections(model: DRTForCausalLM, use_cache: bool) -> float:
    """Floating-point operations of every weight matrix while one segment is read, with one row of logits."""
    counted = 0.0

    def count(module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * output.numel() * module.in_features

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        model(torch.ones(1, SEGMENT, dtype=torch.long), use_cache=use_cache, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return counted


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"num_encoder_layers": 0, "num_groups": 1}, {"retrieval": False}],
)
def test_projections_are_those_of_the_model(model: DRTForCausalLM, changes: dict[str, Any]) -> None:
    config = DRTConfig(**model.config.to_dict() | changes)
    model = DRTForCausalLM(config).eval()
    for whole in (False, True):  # without a cache the upper decoder runs over everything
        products = prefill_products(config, SEGMENT, 0, whole=whole)
        counted = count_projections(model, use_cache=not whole)
        assert flops(products, "projection") == pytest.approx(counted, rel=1e-12)


def test_the_model_multiplies_at_least_that_much(model: DRTForCausalLM) -> None:
    # Only attention that is made of plain products is counted on a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.ones(1, SEGMENT, dtype=torch.long), use_cache=True, logits_to_keep=1)
    products = prefill_products(model.config, SEGMENT, 0)
    total = counter.get_total_flops()
    assert flops(products, "projection", "encoder") < total
    assert flops(products, "projection", "encoder") > 0.5 * total  # of the same order: no factor is lost


def test_attention_by_hand(model: DRTForCausalLM) -> None:
    context = 40 * CHUNK
    products = prefill_products(model.config, SEGMENT, context, whole=True)
    size, layers, upper, groups, window, top_k = 32, 3, 2, 2, 24, 2
    # Of each query with each key over all heads: 2 x size for the score, 2 x size for the value.
    assert flops(products, "window") == pytest.approx(4 * size * layers * POSITIONS * window)
    assert flops(products, "encoder") == pytest.approx(4 * size * CHUNKS * (CHUNK + 1) ** 2)
    assert flops(products, "chunks") == pytest.approx(4 * size * upper * POSITIONS * top_k * CHUNK)
    assert flops(products, "retrieval") == pytest.approx(2 * size * groups * CHUNKS * 40)


def test_only_retrieval_depends_on_what_was_read(model: DRTForCausalLM) -> None:
    near, far = (prefill_products(model.config, SEGMENT, context, whole=True) for context in (1000, 4000))
    assert [product.name for product in near] == [product.name for product in far]
    changed = [one.part for one, two in zip(near, far, strict=True) if one.flops != two.flops]
    assert changed == ["retrieval"]
    assert flops(far, "retrieval") == pytest.approx(4 * flops(near, "retrieval"))


def test_cost_is_in_proportion_to_the_segment(model: DRTForCausalLM) -> None:
    one, ten = (
        prefill_products(model.config, segment, 1000, whole=True) for segment in (SEGMENT, 10 * SEGMENT)
    )
    for short, long in zip(one, ten, strict=True):
        assert long.flops == pytest.approx(short.flops * (1 if short.name == "head" else 10))


def test_the_upper_decoder_costs_the_same_whatever_is_read(model: DRTForCausalLM) -> None:
    one, ten = (prefill_products(model.config, segment, 1000) for segment in (SEGMENT, 10 * SEGMENT))
    for short, long in zip(one, ten, strict=True):
        once = short.name.startswith(("upper", "head", "chunks", "landmark"))
        assert long.flops == pytest.approx(short.flops * (1 if once else 10)), short.name


def test_without_retrieval_there_is_only_the_window_model(model: DRTForCausalLM) -> None:
    config = DRTConfig(**model.config.to_dict() | {"retrieval": False})
    assert {product.part for product in prefill_products(config, SEGMENT, 10**6)} == {"projection", "window"}


def test_flops_of_a_product() -> None:
    product = MatrixProduct("x", "window", count=2, matrices=1.5, rows=3, inner=5, columns=7)
    assert math.isclose(product.flops, 2 * 2 * 1.5 * 3 * 5 * 7)
