"""Kernels run on their tensors' device, not on the current one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from drt.ops.device_guard import on_its_device


def test_the_first_tensors_device_is_the_current_one_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first, second = torch.zeros(1), torch.zeros(2)

    @on_its_device
    def launch(tensor, other, *, scale):
        assert current == [first]
        return tensor, other, scale

    assert launch(first, second, scale=2) == (first, second, 2)
    assert not current


def test_tensors_of_the_cpu_need_none() -> None:
    assert float(on_its_device(torch.sum)(torch.ones(3))) == 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_every_kernel_on_the_second_device() -> None:
    from drt.models.drt import DRTConfig, DRTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    config = DRTConfig(**sizes, num_lower_layers=1, num_upper_layers=2)
    model = DRTForCausalLM(config)
    ids = torch.randint(3, 259, (2, 700))
    expected = model(ids, labels=ids).loss
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    other = model.to("cuda:1")
    assert torch.cuda.current_device() == 0
    loss = other(ids.to("cuda:1"), labels=ids.to("cuda:1")).loss
    loss.backward()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-2, atol=1e-2)
    for name, p in other.named_parameters():
        torch.testing.assert_close(p.grad.cpu(), wanted[name], rtol=5e-2, atol=5e-3)
    with torch.no_grad():
        model.eval().generate(ids.to("cuda:1"), max_new_tokens=3, do_sample=False)
