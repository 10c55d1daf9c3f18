"""What the command chooses by the machine, here alone: device, precision, and what a device asks of a trainer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch

from tunerkit.errors import ConfigError

# The dtype of matrix products in each precision. Weights, adapters and optimizer state keep their own.
DTYPES: Final[Mapping[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Where bf16 is not the default: on CPUs, because only some have instructions for it, and on Apple's GPUs, because the
# older ones emulate it.
_IN_FP32: Final = ("cpu", "mps")


def choose_device(*, use_cpu: bool = False) -> torch.device:
    """Return the accelerator if there is one and the recipe's trainer may use it, else the CPU."""
    if use_cpu:
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def obstacle(device: torch.device, precision: str) -> str | None:
    """Why ``device`` cannot train in ``precision``, as the end of a sentence about it; None if it can."""
    if precision == "bf16" and not _has_bf16(device):
        return f"this {device.type} device does not compute in bf16"
    if precision == "fp16" and device.type == "cpu":
        return "fp16 needs an accelerator, and there is none: only the CPU"
    return None


def choose_precision(device: torch.device, asked: str | None, *, resumed: str = "") -> str:
    """Return the precision to train in: the one that was asked for, or the device's own. Raises `ConfigError`."""
    # A CPU trains in fp32, whatever it is: results must not change with the processor.
    own = "bf16" if device.type not in _IN_FP32 and _has_bf16(device) else "fp32"
    if asked is None:
        return own
    if (problem := obstacle(device, asked)) is not None:
        if resumed:
            do = "resume it on a machine that has it, or begin again with --overwrite"
            raise ConfigError(
                [f"--resume: the run in {resumed} trains in {asked}, and {problem}; {do} --precision {own}"]
            )
        raise ConfigError([f"precision: {asked} was asked for, and {problem}; pass --precision {own}"])
    return asked


def trainer_settings(device: torch.device, precision: str) -> dict[str, Any]:
    """The trainer's arguments that follow from the device and the precision."""
    return {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": device.type == "cpu",  # transformers takes bf16 on a CPU only if it is told so
        "dataloader_pin_memory": device.type != "cpu",
    }


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Inside the block, matrix products are computed in ``precision``, as the trainer computes them."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=DTYPES[precision])


def _has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16; CUDA's emulation, which is slow, does not count. Every CPU does."""
    if device.type == "cpu":
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    return bool(is_torch_bf16_gpu_available())
