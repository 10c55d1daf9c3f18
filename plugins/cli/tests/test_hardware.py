"""What the command chooses by the machine: each branch, on machines that are made up."""

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers.utils import import_utils

from tunerkit.errors import ConfigError
from tunerkit_cli.machine import hardware

CPU, CUDA, MPS, XPU = (torch.device(name) for name in ("cpu", "cuda", "mps", "xpu"))
# What a processor or an accelerator answers: with and without instructions for bf16.
WITH: Mapping[str, bool] = {"cpu": True, "cuda": True, "other": True}
WITHOUT: Mapping[str, bool] = dict.fromkeys(WITH, False)


@pytest.fixture(autouse=True)
def _own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice itself is tested here, whatever machine the tests believe to be on."""
    own = inspect.unwrap(hardware.choose_precision)
    monkeypatch.setattr(hardware, "choose_precision", own)


def answering(monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, bool]) -> None:
    """Make torch and transformers describe a machine: its CPU's instructions, and whether accelerators have bf16."""
    for question in ("_is_amx_tile_supported", "_is_amx_fp16_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda: answers["cpu"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: answers["cuda"])
    monkeypatch.setattr(import_utils, "is_torch_bf16_gpu_available", lambda: answers["other"])


@pytest.mark.parametrize("answers", [WITH, WITHOUT], ids=["with AMX", "without"])
def test_a_cpu_trains_in_fp32_whatever_it_is(answers: Mapping[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first result that somebody sees does not depend on his processor; any has bf16 if it is asked for."""
    answering(monkeypatch, answers)
    assert hardware.choose_precision(CPU, None) == "fp32"
    assert hardware.choose_precision(CPU, "bf16") == "bf16"


@pytest.mark.parametrize(
    ("device", "answers", "chosen"),
    [(CUDA, WITH, "bf16"), (CUDA, WITHOUT, "fp32"), (XPU, WITH, "bf16"), (XPU, WITHOUT, "fp32"), (MPS, WITH, "fp32")],
)
def test_an_accelerator_trains_in_bf16_if_it_has_it(
    device: torch.device, answers: Mapping[str, bool], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Apple's GPUs it may be emulated, and is not the default."""
    answering(monkeypatch, answers)
    assert hardware.choose_precision(device, None) == chosen


@pytest.mark.parametrize(
    ("device", "asked", "answers", "message"),
    [
        (CPU, "fp16", WITH, "fp16 was asked for, and fp16 needs an accelerator, and there is none: only the CPU"),
        (
            CUDA,
            "bf16",
            WITHOUT,
            "bf16 was asked for, and this cuda device does not compute in bf16; pass --preci",
        ),
        (
            XPU,
            "bf16",
            WITHOUT,
            "bf16 was asked for, and this xpu device does not compute in bf16; pass --preci",
        ),
        (
            MPS,
            "bf16",
            WITHOUT,
            "bf16 was asked for, and this mps device does not compute in bf16; pass --preci",
        ),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused(
    device: torch.device, asked: str, answers: Mapping[str, bool], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error says what was asked for, why it cannot be, and what can."""
    answering(monkeypatch, answers)
    with pytest.raises(ConfigError, match=message):
        hardware.choose_precision(device, asked)
    with pytest.raises(ConfigError, match=f"--resume: the run in out/a trains in {asked}, and "):
        hardware.choose_precision(device, asked, resumed="out/a")


@pytest.mark.parametrize("asked", ["fp32", "bf16", "fp16"])
def test_an_accelerator_takes_each_precision_that_it_has(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for is never replaced by something else."""
    answering(monkeypatch, WITH)
    assert hardware.choose_precision(CUDA, asked) == asked


@pytest.mark.parametrize("found", [torch.device("meta"), None])
def test_the_device_is_the_accelerator_if_there_is_one(
    found: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the CPU if the recipe says so."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert hardware.choose_device() == (found or CPU)
    assert hardware.choose_device(use_cpu=True) == CPU


@pytest.mark.parametrize(
    ("device", "precision", "wanted"),
    [
        (CPU, "fp32", {"bf16": False, "fp16": False, "use_cpu": True, "dataloader_pin_memory": False}),
        (CPU, "bf16", {"bf16": True, "fp16": False, "use_cpu": True, "dataloader_pin_memory": False}),
        (CUDA, "fp16", {"bf16": False, "fp16": True, "use_cpu": False, "dataloader_pin_memory": True}),
    ],
)
def test_the_trainer_is_told_of_device_and_precision(
    device: torch.device, precision: str, wanted: dict[str, Any]
) -> None:
    """Transformers takes bf16 on a CPU only if it is told that the CPU is meant."""
    assert hardware.trainer_settings(device, precision) == wanted


@pytest.mark.parametrize("precision", [*hardware.DTYPES])
def test_products_are_computed_in_the_precision_inside_the_block(precision: str) -> None:
    """As accelerate's autocast computes them; outside they are as they were."""
    layer = torch.nn.Linear(4, 4)
    with hardware.computing_in(precision, CPU):
        assert layer(torch.ones(1, 4)).dtype == hardware.DTYPES[precision]
    assert layer(torch.ones(1, 4)).dtype == torch.float32
