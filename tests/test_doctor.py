"""What the doctor says of the Hopper kernels on machines of all kinds."""

import pytest
import torch

from rtlynx.cli import doctor
from rtlynx.cuda import jit


@pytest.fixture
def cards(monkeypatch):
    """Pretend that the machine has cards of these compute capabilities."""

    def pretend(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device}")

    return pretend


def _layer(monkeypatch, error: float | Exception, loaded: int) -> list[str]:
    """Pretend that layers have this error, or fail; the devices that were asked."""
    asked = []

    def run(device, *_, **__):
        asked.append(device)
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(doctor, "_layer_error", run)
    monkeypatch.setattr(jit, "loaded", lambda: loaded)
    return asked


def test_other_cards_need_no_kernels(cards):
    cards((10, 0), (8, 0))
    check = doctor._kernel_check()
    assert check.ok is None
    assert "plain PyTorch" in check.detail
    assert "Card 0, has 10.0" in check.detail


def test_every_hopper_card_runs_a_layer(cards, monkeypatch):
    cards((8, 0), jit.HOPPER, jit.HOPPER)
    asked = _layer(monkeypatch, 1.7e-3, loaded=2)
    check = doctor._kernel_check()
    assert asked == ["cuda:1", "cuda:2"]
    assert check.ok is True
    assert "1.7e-03 against float64 in bfloat16 on cuda:1, cuda:2" in check.detail


@pytest.mark.parametrize(
    ("error", "loaded", "said"),
    [
        (0.3, 2, "3.0e-01"),
        (1.7e-3, 0, "ran without them"),
        (
            jit.CompileError("gemm.cu does not compile:\nerror: no"),
            0,
            "cuda:0: gemm.cu does not compile: error: no",
        ),
        (KeyError("surprise"), 0, "surprise"),
    ],
)
def test_kernels_that_do_not_work_on_a_hopper_card_fail_the_check(cards, monkeypatch, error, loaded, said):
    cards(jit.HOPPER)
    _layer(monkeypatch, error, loaded)
    check = doctor._kernel_check()
    assert check.ok is False
    assert said in check.detail


def test_a_hopper_card_without_a_compiler_fails_the_check(cards, monkeypatch):
    def missing():
        raise jit.CompileError("NVRTC is missing: pip install nvidia-cuda-nvrtc")

    cards(jit.HOPPER)
    monkeypatch.setattr(jit, "nvrtc", missing)
    check = doctor._kernel_check()
    assert check.ok is False
    assert "pip install nvidia-cuda-nvrtc" in check.detail
    assert "missing" in doctor._compiler_check().detail


@pytest.mark.gpu
def test_the_kernels_run_on_this_card():
    if jit.HOPPER not in [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]:
        pytest.skip("needs a Hopper card")
    check = doctor._kernel_check()
    assert check.ok, check.detail
