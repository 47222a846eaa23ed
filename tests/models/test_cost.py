"""The count of matrix products: against what the models multiply, against a hand count, and its shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from drt.models.cost import MatrixProduct, prefill_products, training_flops, training_products
from drt.models.drt import DRTConfig, DRTForCausalLM
from drt.models.window import WindowConfig
from drt.ops.window_attention import window_attention

CHUNKS, CHUNK = 6, 15
SEGMENT = CHUNKS * CHUNK
POSITIONS = CHUNKS * (CHUNK + 1)
ROW = 42  # tokens: six chunks of the landmark model, six blocks of the recurrent one


@pytest.fixture(scope="module")
def model() -> DRTForCausalLM:
    torch.manual_seed(0)
    config = DRTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_lower_layers=1,
        num_upper_layers=2,
        num_groups=2,
        num_encoder_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        chunk_size=CHUNK,
        retrieval_top_k=2,
        sliding_window=24,
        eos_token_id=None,
    )
    return DRTForCausalLM(config).eval()


def flops(products: list[MatrixProduct], *parts: str) -> float:
    return sum(product.flops for product in products if not parts or product.part in parts)


def count_projections(model: PreTrainedModel, length: int, **options: Any) -> float:
    """Floating-point operations of every weight matrix in a forward pass over one row."""
    counted = 0.0

    def count(module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * output.numel() * module.in_features

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        model(torch.ones(1, length, dtype=torch.long), **options)
    for hook in hooks:
        hook.remove()
    return counted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_encoder_layers": 0, "num_groups": 1},
        {"retrieval": False},
        {"num_upper_layers": [1, 2]},
        {"num_upper_layers": 0, "num_groups": 1},
        {"num_upper_layers": 0, "num_groups": 1, "retrieval": False},
    ],
)
def test_projections_are_those_of_the_model(model: DRTForCausalLM, changes: dict[str, Any]) -> None:
    config = DRTConfig(**model.config.to_dict() | changes)
    model = DRTForCausalLM(config).eval()
    for whole in (False, True):  # without a cache the upper decoder runs over everything
        products = prefill_products(config, SEGMENT, 0, whole=whole)
        counted = count_projections(model, SEGMENT, use_cache=not whole, logits_to_keep=1)
        assert flops(products, "projection") == pytest.approx(counted, rel=1e-12)
    trained = training_products(config, SEGMENT)
    assert all(product.flops >= 0 for product in (*products, *trained))
    counted = count_projections(model, SEGMENT, use_cache=False)
    assert flops(trained, "projection") == pytest.approx(counted, rel=1e-12)


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
    reading = (upper - 1) * POSITIONS + 1  # the last layer reads for the one state that is wanted
    assert flops(products, "chunks") == pytest.approx(4 * size * reading * top_k * CHUNK)
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
        once = short.name == "head" or " last " in short.name  # where a state is wanted
        assert long.flops == pytest.approx(short.flops * (1 if once else 10)), short.name


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


def test_training_attention_by_hand(model: DRTForCausalLM) -> None:
    products = training_products(model.config, SEGMENT)
    size, layers, upper, groups = 32, 3, 2, 2
    seen = sum(min(position + 1, 24) for position in range(POSITIONS))
    assert flops(products, "window") == pytest.approx(4 * size * layers * seen)
    assert flops(products, "encoder") == pytest.approx(4 * size * CHUNKS * (CHUNK + 1) ** 2)
    read = sum(min(chunk, 2) for chunk in range(CHUNKS)) * CHUNK
    reading = (upper - 1) * (
        CHUNK + 1
    ) + CHUNK  # positions of a chunk, over the layers; the last wants one a token
    assert flops(products, "chunks") == pytest.approx(4 * size * reading * read)
    assert flops(products, "retrieval") == pytest.approx(2 * size * groups * sum(range(CHUNKS)))
    assert training_flops(model.config, SEGMENT) == pytest.approx(3 * flops(products) / SEGMENT)


# Query and key pairs of a row: those that the mathematics needs, and those that the equations, written down densely,
# multiply.
IN_WINDOW = sum(min(position + 1, 10) for position in range(ROW))
SLOTS = ROW // 7 * 8
PAIRS = {
    "window": (IN_WINDOW, ROW**2),
    "block_recurrent": (IN_WINDOW, ROW**2),
    "full_attention": (ROW * (ROW + 1) // 2, ROW**2),
    "landmark": (SLOTS * (SLOTS + 1) // 2, SLOTS**2),
}


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}])
@pytest.mark.parametrize("name", PAIRS)
def test_baselines_multiply_what_is_counted(
    make_baseline: Callable[..., PreTrainedModel],
    name: str,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = partial(window_attention, impl="reference")
    monkeypatch.setattr("drt.layers.window_attention.window_attention", dense)
    model = make_baseline(name, **changes).train()  # the landmark model reads everything in training only
    products = training_products(model.config, ROW)
    counted = count_projections(model, ROW, use_cache=False)
    assert flops(products, "projection") == pytest.approx(counted, rel=1e-12)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.ones(1, ROW, dtype=torch.long), use_cache=False)
    needed, multiplied = PAIRS[name]
    expected = flops(products, "projection", "state") + flops(products, "window") * multiplied / needed
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def test_operations_of_a_window_model_by_hand() -> None:
    config = WindowConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        sliding_window=4,
    )
    # Position t of ten sees min(t + 1, 4) keys: 1 + 2 + 3 + 7 x 4 = 34; two products of 2 x 8 operations a key.
    matrices = 3 * (4 * 8 * 8 + 3 * 8 * 16) + 8 * 50
    assert training_flops(config, 10) == pytest.approx(3 * (2 * matrices + 3 * 2 * 2 * 8 * 3.4))


def test_a_fixed_retriever_scores_nothing(model: DRTForCausalLM) -> None:
    fixed = model.config.to_dict() | {"retriever": "random", "num_groups": 1}
    assert not [
        product for product in training_products(DRTConfig(**fixed), 99) if product.part == "retrieval"
    ]


def test_other_models_are_not_counted() -> None:
    with pytest.raises(ValueError, match="one of drt's models, got PreTrainedConfig"):
        training_flops(PreTrainedConfig(), 10)
