"""A small DRT on a GPU: the same results as on the CPU, no waiting for the device, and training in 16 bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drt.memory import ArchiveDescription, ChunkStore, DeviceStore, HostStore
from drt.models.drt import DRTCache, DRTConfig, DRTForCausalLM
from drt.models.drt.fingerprint import model_fingerprint
from drt.ops.chunk_retrieval import retrieve_chunks

pytestmark = pytest.mark.gpu
CONFIG = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_lower_layers": 1,
    "num_upper_layers": 2,
    "num_groups": 2,
    "num_encoder_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "chunk_size": 15,
    "retrieval_top_k": 3,
    "sliding_window": 20,
}


def build(device: str, **changes: object) -> DRTForCausalLM:
    torch.manual_seed(0)
    model = DRTForCausalLM(DRTConfig(**{**CONFIG, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(device)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Anything that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("position_embedding", ["alibi", "rope"])
def test_the_logits_and_gradients_of_the_cpu(position_embedding: str) -> None:
    tokens = torch.randint(0, 300, (2, 200))
    results = []
    for device in ("cpu", "cuda"):
        model = build(device, position_embedding=position_embedding)
        output = model(input_ids=tokens.to(device), use_cache=False)
        output.logits.square().mean().backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append([x.detach().cpu() for x in (output.logits, *grads)])
    assert len(results[0]) == len(results[1]) > 10
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_generation_is_that_of_the_cpu() -> None:
    tokens = torch.randint(2, 300, (2, 150))
    found = [
        build(device).generate(tokens.to(device), max_new_tokens=20, do_sample=False, eos_token_id=None).cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*found)


def test_a_training_step_never_waits_for_the_device() -> None:
    model = build("cuda", gumbel_noise=True).train()
    tokens = torch.randint(0, 300, (2, 200), device="cuda")
    for waiting in (True, False):  # the first step compiles kernels and lays the chunks out
        if waiting:
            model(input_ids=tokens, labels=tokens).loss.backward()
            continue
        with no_waiting():
            model(input_ids=tokens, labels=tokens).loss.backward()


def test_retrieval_never_waits_for_the_device() -> None:
    query, landmarks = torch.randn(2, 1, 300, 64, device="cuda").unbind(0)
    visible = torch.arange(300, device="cuda").unsqueeze(0)
    retrieve_chunks(query, landmarks, visible, top_k=4, gumbel=True)
    with no_waiting():
        found = retrieve_chunks(query, landmarks, visible, top_k=4, gumbel=True)
    assert (found.chunk_indices.cpu() < visible.cpu().unsqueeze(-1)).all()


class Operations(TorchDispatchMode):
    """Keeps the dtype of the queries that our operations get."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "drt" and "backward" not in func.name():
            self.seen.append((func.name(), args[0].dtype))
        return func(*args, **(kwargs or {}))


def test_autocast_trains_by_the_kernels_in_bfloat16() -> None:
    model = build("cuda").train()
    tokens = torch.randint(0, 300, (2, 200), device="cuda")
    with Operations() as operations, torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert {one for one in operations.seen if "attention" in one[0]} == {
        ("drt::grouped_cross_attention_triton", torch.bfloat16),
        ("drt::window_attention_triton", torch.bfloat16),
    }
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_the_compiled_training_step_is_the_eager_one() -> None:
    tokens = torch.randint(0, 300, (2, 200), device="cuda")
    results = []
    for compiled in (False, True):
        model = build("cuda").train()
        run = torch.compile(model) if compiled else model
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_host_memory_gives_the_bits_of_device_memory(dtype: torch.dtype) -> None:
    """A text in passes of many chunks, then token by token: most of these close no chunk."""
    tokens = torch.randint(0, 300, (2, 230), device="cuda")
    parts = [tokens[:, :90], tokens[:, 90:190], *tokens[:, 190:].split(1, 1)]
    results = []
    for store in (DeviceStore, HostStore):
        model = build("cuda").eval().to(dtype)
        cache = DRTCache(model.config, store(dtype=str(dtype).removeprefix("torch.")))
        with torch.inference_mode():
            logits = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts]
        results.append(torch.cat(logits, 1))
    assert torch.equal(*results)


def describe(model: DRTForCausalLM, dtype: str) -> ArchiveDescription:
    heads, width = model.config.key_value_shape
    size = model.config.chunk_size
    return ArchiveDescription(
        "small", model_fingerprint(model), "", size, heads, width, model.config.hidden_size, 90, dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tier", ["host", "archive"])
@torch.inference_mode()
def test_two_questions_of_a_text_that_lies_elsewhere(dtype: torch.dtype, tier: str, tmp_path: Path) -> None:
    """Two rows are made of the one that read it; scores may differ in their last bits, so bfloat16 is only near."""
    model, name = build("cuda").eval().to(dtype), str(dtype).removeprefix("torch.")
    text = torch.randint(0, 300, (1, 200), device="cuda")
    questions = torch.randint(0, 300, (2, 40), device="cuda")

    def read(store: ChunkStore) -> DRTCache:
        cache = DRTCache(model.config, store)
        model(input_ids=text, past_key_values=cache)
        return cache

    def answer(cache: DRTCache) -> torch.Tensor:
        cache.select_rows(torch.tensor([0, 0]))
        return model(input_ids=questions, past_key_values=cache).logits.float()

    if tier == "archive":
        read(DeviceStore()).save(tmp_path / "archive", describe(model, name))
        found = answer(DRTCache.open(tmp_path / "archive", model))
    else:
        found = answer(read(HostStore(name)))
    expected = answer(read(DeviceStore()))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_copies_of_a_memory_on_the_host_go_their_own_ways() -> None:
    """Also when what was read last has not arrived there yet."""
    model = build("cuda").eval()
    text, *ways = torch.randint(0, 300, (3, 1, 200), device="cuda")
    question = torch.randint(0, 300, (1, 40), device="cuda")

    def read(tokens: torch.Tensor, cache: DRTCache) -> DRTCache:
        model(input_ids=tokens, past_key_values=cache)
        return cache

    expected = []
    for way in ways:
        cache = read(way, read(text, DRTCache(model.config, HostStore("float32"))))
        expected.append(model(input_ids=question, past_key_values=cache).logits)
    begun = read(text, DRTCache(model.config, HostStore("float32")))
    copies = [read(way, copy.deepcopy(begun)) for way in ways]
    for one, wanted in zip(copies, expected, strict=True):
        found = model(input_ids=question, past_key_values=one).logits
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_half_precision_reading_is_near_float32() -> None:
    tokens = torch.randint(0, 300, (1, 400), device="cuda")
    model = build("cuda").eval()
    with torch.inference_mode():
        exact = model(input_ids=tokens).logits
        half = model.bfloat16()(input_ids=tokens).logits.float()
    assert (half - exact).square().mean() < 1e-2 * exact.square().mean()
