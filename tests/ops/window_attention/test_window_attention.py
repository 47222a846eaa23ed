"""The banded implementation against the dense equations: forward, every gradient, precision and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from drt.ops.window_attention import alibi_slopes, apply_rope, window_attention
from drt.testing.largest_tensor import LargestTensor
from drt.testing.tolerance import assert_as_accurate

LENGTHS = (1, 5, 63, 64, 65, 130)
WINDOWS = (1, 2, 7, 64, 200)


def draw(length: int, past: int = 0, heads: int = 4, kv_heads: int = 2, dtype=torch.float64) -> list[Tensor]:
    """Query, key, value and an incoming gradient, for two rows."""
    generator = torch.Generator().manual_seed(length + past)
    shapes = [(length, heads), (past + length, kv_heads), (past + length, kv_heads), (length, heads)]
    return [
        torch.randn(2, slots, h, 8, generator=generator, dtype=torch.float64).to(dtype) for slots, h in shapes
    ]


def run(inputs: list[Tensor], impl: str | None, **arguments: Any) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    output = window_attention(*leaves, impl=impl, **arguments)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3])]


def assert_banded_is_dense(inputs: list[Tensor], **arguments: Any) -> None:
    for got, want in zip(
        run(inputs, "banded", **arguments), run(inputs, "reference", **arguments), strict=True
    ):
        tolerance = 1e-10 if want.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alibi", [False, True], ids=["no bias", "alibi"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_and_every_gradient(length: int, window: int, alibi: bool) -> None:
    slopes = alibi_slopes(4) if alibi else None
    for dtype in (torch.float64, torch.float32):
        assert_banded_is_dense(draw(length, dtype=dtype), window=window, alibi_slopes=slopes)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("length", "past"), [(0, 0), (0, 5), (1, 1), (1, 300), (5, 3), (64, 6), (65, 63), (65, 64), (130, 250)]
)
def test_past_keys(length: int, past: int, window: int) -> None:
    assert_banded_is_dense(draw(length, past), window=window, alibi_slopes=alibi_slopes(4))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("length", "past", "start"),
    [
        (5, 0, (0, 3)),
        (65, 0, (64, 1)),
        (130, 0, (129, 0)),
        (1, 63, (63, 10)),
        (1, 9, (0, 9)),
        (65, 63, (20, 63)),
        (130, 7, (137, 100)),
    ],
)
def test_rows_whose_first_keys_do_not_exist(
    length: int, past: int, start: tuple[int, int], window: int
) -> None:
    inputs = draw(length, past)
    key_start = torch.tensor(start)
    assert_banded_is_dense(inputs, window=window, key_start=key_start, alibi_slopes=alibi_slopes(4))
    query, key, value, _ = inputs
    output = window_attention(query, key, value, window=window, key_start=key_start)
    for row, first in enumerate(start):  # a row is as if its missing keys had never been there
        kept = min(length, past + length - first)
        assert output[row, : length - kept].count_nonzero() == 0
        if kept:
            alone = window_attention(
                query[row : row + 1, length - kept :],
                key[row : row + 1, first:],
                value[row : row + 1, first:],
                window=window,
            )
            torch.testing.assert_close(output[row, length - kept :], alone[0])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (6, 3), (12, 2)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    assert_banded_is_dense(draw(70, 5, heads, kv_heads), window=9, alibi_slopes=alibi_slopes(heads))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("length", [32, 64, 2048])
def test_one_row_of_whole_blocks(length: int, kv_heads: int) -> None:
    """Its queries are a view with strides of their own; results must not be written to a copy of one."""
    assert_banded_is_dense([x[:1] for x in draw(length, kv_heads=kv_heads)], window=7)


def test_a_query_sees_window_keys_itself_included() -> None:
    """Keys are all alike, so the output is the mean of the values seen."""
    value = torch.arange(100.0, dtype=torch.float64).view(1, 100, 1, 1)
    for impl in ("banded", "reference"):
        output = window_attention(
            torch.zeros_like(value), torch.zeros_like(value), value, window=10, impl=impl
        )
        seen = [value[0, max(0, t - 9) : t + 1].mean() for t in range(100)]
        torch.testing.assert_close(output.flatten(), torch.stack(seen))


def test_scale() -> None:
    inputs = draw(70)
    query, *rest = inputs
    torch.testing.assert_close(
        run(inputs, None, window=9, scale=0.5)[0], run([query * 0.5 * 8**0.5, *rest], None, window=9)[0]
    )


@pytest.mark.parametrize("window", [7, 200])
@pytest.mark.parametrize("length", [5, 65, 130])
def test_bfloat16_is_as_accurate_as_the_equations_in_bfloat16(length: int, window: int) -> None:
    inputs = draw(length, past=3, dtype=torch.bfloat16)
    arguments = {"window": window, "alibi_slopes": alibi_slopes(4)}
    exact = run([x.double() for x in inputs], "reference", **arguments)
    for name, *results in zip(
        ("output", "query", "key", "value"),
        run(inputs, "banded", **arguments),
        run(inputs, "reference", **arguments),
        exact,
        strict=True,
    ):
        assert_as_accurate(name, *results)


@pytest.mark.parametrize("key_start", [None, (0, 3)])
def test_gradients_are_finite_differences(key_start: tuple[int, int] | None) -> None:
    start = None if key_start is None else torch.tensor(key_start)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return window_attention(query, key, value, window=3, key_start=start, alibi_slopes=alibi_slopes(2))

    leaves = [x.requires_grad_() for x in draw(5, past=1, heads=2, kv_heads=1)[:3]]
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("key_start", [None, (0, 3)])
def test_compiled_gradients(key_start: tuple[int, int] | None) -> None:
    """The overlapping views of the keys must not lie where a compiled graph is split."""
    start = None if key_start is None else torch.tensor(key_start)
    inputs = draw(70)
    torch._dynamo.reset()  # what other tests compiled
    compiled = torch.compile(window_attention, backend="aot_eager")
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    output = compiled(*leaves, window=5, key_start=start)
    gradients = torch.autograd.grad(output, leaves, inputs[3])
    for got, want in zip([output, *gradients], run(inputs, None, window=5, key_start=start), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("key_start", [None, (0, 3)])
def test_operator_registration(key_start: tuple[int, int] | None) -> None:
    start = None if key_start is None else torch.tensor(key_start)
    query, key, value, grad = draw(6, past=1, dtype=torch.bfloat16)
    operators = torch.ops.drt
    arguments = (start, alibi_slopes(4), 3, 0.25)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(operators.window_attention_banded, (*leaves, *arguments))
    inputs = [x.detach() for x in (grad, query, key, value)]
    torch.library.opcheck(operators.window_attention_banded_backward, (*inputs, *arguments))


def test_memory_is_linear_in_the_length() -> None:
    largest = []
    for length in (2048, 4096):
        with LargestTensor() as record:
            run([torch.zeros(1, length, 2, 8)] * 4, "banded", window=128, alibi_slopes=alibi_slopes(2))
        largest.append(record.numel)
    assert largest[1] <= 2.2 * largest[0]
    assert largest[1] < 4096 * 2 * 2 * (128 + 64), "a few times heads x (window + block) a query"
    with LargestTensor() as record:
        run([torch.zeros(1, 2048, 2, 8)] * 4, "reference", window=128)
    assert record.numel >= 2048**2


@pytest.mark.parametrize("heads", [4, 6, 12])
def test_alibi_slopes(heads: int) -> None:
    expected = [2 ** (-8 * (head + 1) / heads) for head in range(heads)]
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(expected), rtol=1e-6, atol=0)
    assert alibi_slopes(heads)[-1] == 2**-8


def test_alibi_is_a_penalty_on_distance() -> None:
    """Against a softmax written out, for one query at the end."""
    slopes = alibi_slopes(2)
    query, key, value, _ = draw(12, heads=2, kv_heads=2)
    distance = torch.arange(11, -1, -1)
    scores = torch.einsum("bhd,bkhd->bhk", query[:, -1], key) / 8**0.5 - slopes.view(2, 1) * distance
    expected = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), value)
    output = window_attention(query, key, value, window=12, alibi_slopes=slopes)
    torch.testing.assert_close(output[:, -1], expected)


@pytest.mark.parametrize("offset", [0, 1000, 10**9])
def test_rope_scores_depend_on_the_difference_of_positions_only(offset: int) -> None:
    query, key, *_ = draw(20, heads=2, kv_heads=2)
    positions = torch.arange(20)
    near = torch.einsum("bqhd,bkhd->bhqk", apply_rope(query, positions, 1e4), apply_rope(key, positions, 1e4))
    far = torch.einsum(
        "bqhd,bkhd->bhqk",
        apply_rope(query, positions + offset, 1e4),
        apply_rope(key, positions + offset, 1e4),
    )
    torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-6)
    assert (near - torch.einsum("bqhd,bkhd->bhqk", query, key)).abs().max() > 0.1


def test_rope_in_one_compiled_graph() -> None:
    x, positions = torch.randn(2, 5, 3, 8, requires_grad=True), torch.arange(5)
    results = []
    for function in (apply_rope, torch.compile(apply_rope, fullgraph=True, backend="aot_eager")):
        turned = function(x, positions, 1e4)
        results.append([turned, *torch.autograd.grad(turned.square().sin().sum(), x)])
    torch.testing.assert_close(*results)
    torch.library.opcheck(torch.ops.drt.rope_angles, (positions, 8, 1e4, torch.bfloat16))


def test_rope_turns_pairs_by_their_angles() -> None:
    x = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    x[..., 0] = 1  # pair (0, 2), frequency 1
    x[..., 1] = 1  # pair (1, 3), frequency theta^(-1/2)
    turned = apply_rope(x, torch.tensor([0, 1, 5]), 100.0)[0, :, 0]
    angle = torch.tensor([0.0, 1, 5], dtype=torch.float64)
    expected = torch.stack([angle.cos(), (angle / 10).cos(), angle.sin(), (angle / 10).sin()], -1)
    torch.testing.assert_close(turned, expected)
    by_row = apply_rope(x.expand(2, -1, -1, -1), torch.tensor([[0, 1, 5], [1, 1, 1]]), 100.0)
    torch.testing.assert_close(by_row[0, :, 0], expected)
    torch.testing.assert_close(by_row[1, :, 0], expected[1:2].expand(3, -1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"query": torch.zeros(2, 6, 8)}, r"query must be \(B, Lq, h, D\).*got \(2, 6, 8\)"),
        ({"value": torch.zeros(2, 6, 1, 8)}, r"key and value .*\(2, 6, 2, 8\) and \(2, 6, 1, 8\)"),
        ({"query": torch.zeros(2, 7, 4, 8)}, r"Lq <= Lk, got \(2, 7, 4, 8\)"),
        ({"query": torch.zeros(2, 6, 3, 8)}, "key heads must divide query heads, got 2 and 3"),
        ({"key_start": torch.zeros(3)}, r"key_start must be \(2,\), got \(3,\)"),
        ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes must be \(4,\), got \(2,\)"),
        ({"impl": "flash"}, "impl must be one of reference, banded, flex, triton or None; got 'flash'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    key = torch.zeros(2, 6, 2, 8)
    arguments = {"query": torch.zeros(2, 6, 4, 8), "key": key, "value": key, "window": 4}
    with pytest.raises(ValueError, match=message):
        window_attention(**(arguments | changes))


def test_sizes_of_positions_are_checked() -> None:
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        alibi_slopes(0)
    with pytest.raises(ValueError, match="even head_dim, got 3"):
        apply_rope(torch.zeros(1, 1, 1, 3), torch.arange(1), 1e4)
