"""Settings that round float32 products are switched off for the products, and are then as they were."""

from __future__ import annotations

import itertools

import pytest
import torch

from hesd_fast.problem.model_state import borrowed
from hesd_fast.problem.random_streams import RandomStreams
from hesd_fast.problem.torch_settings import full_float32

SETTINGS = [("generic", "all"), *itertools.product(("cuda", "mkldnn"), ("all", "conv", "rnn", "matmul"))]
OPERATIONS = [setting for setting in SETTINGS if setting[1] != "all"]

CHOICES = {
    "none": lambda: None,
    "matmul high": lambda: torch.set_float32_matmul_precision("high"),
    "matmul medium": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul highest": lambda: torch.set_float32_matmul_precision("highest"),
    "matmul tf32": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "everything tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "everything ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "conv ieee": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "rnn ieee": lambda: setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
    "cuda tf32": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "legacy conv": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "legacy matmul": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "mkldnn bf16": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


def read(getter):
    try:
        return getter()
    except RuntimeError:
        return "refused"


def settings():
    old = (torch._C._get_cudnn_allow_tf32, torch._C._get_cublas_allow_tf32, torch.get_float32_matmul_precision)
    found = [torch._C._get_fp32_precision_getter(*setting) for setting in SETTINGS]
    return [*found, *map(read, old), torch.backends.cudnn.enabled]


@pytest.fixture(autouse=True)
def _as_pytorch_starts():
    before = settings()
    yield
    start_again()
    assert settings() == before


def start_again():
    torch.set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(True)
    for setting in SETTINGS:
        starts = "tf32" if setting in (("cuda", "conv"), ("cuda", "rnn")) else "none"
        torch._C._set_fp32_precision_setter(*setting, starts)


@pytest.mark.parametrize("choice", CHOICES)
def test_operations_are_in_float32_within_and_as_before_after(choice):
    CHOICES[choice]()
    before = settings()
    with full_float32():
        inside = [torch._C._get_fp32_precision_getter(*setting) for setting in OPERATIONS]
        assert inside == ["ieee"] * len(OPERATIONS)
    assert settings() == before


@pytest.mark.parametrize("wider", ["tf32", "ieee"])
@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice not in ("everything tf32", "cuda tf32")])
def test_operations_follow_wider_settings_as_before(choice, wider):
    CHOICES[choice]()
    torch.backends.fp32_precision = wider
    wanted = settings()
    start_again()
    CHOICES[choice]()
    with full_float32():
        pass
    torch.backends.fp32_precision = wider
    assert settings() == wanted


@pytest.mark.parametrize("choice", CHOICES)
def test_old_settings_can_be_read_within_if_they_could_before(choice):
    # torch.compile reads them
    CHOICES[choice]()
    before = settings()[len(SETTINGS) :]
    with full_float32():
        for then, now in zip(before, settings()[len(SETTINGS) :], strict=True):
            assert then == "refused" or now != "refused"


def test_settings_come_back_after_an_error():
    torch.set_float32_matmul_precision("medium")
    before = settings()
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("layer", [torch.nn.Linear(3, 3), torch.nn.LSTM(3, 3)])
def test_a_borrowed_model_computes_in_float32(layer):
    torch.set_float32_matmul_precision("high")
    before = settings()
    with borrowed(layer, list(layer.parameters()), "eval", RandomStreams(), copies=False):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cudnn.enabled == isinstance(layer, torch.nn.Linear)  # has no second derivative
    assert settings() == before
