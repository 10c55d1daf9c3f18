"""The machine that the tests believe to run on: the environment variable TUNERKIT_TEST_MACHINE names it.

What a processor computes differently is not made up but asked for: `make test THREADS=2`, and torch's own
ATEN_CPU_CAPABILITY.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

VARIABLE = "TUNERKIT_TEST_MACHINE"
# What torch says of a CPU's instructions for low precision.
_QUESTIONS = ("_is_amx_tile_supported", "_is_amx_fp16_supported", "_is_avx512_bf16_supported", "_is_vnni_supported")


def _cpu(answer: bool) -> None:
    for question in _QUESTIONS:
        setattr(torch.cpu, question, lambda: answer)


def _accelerator() -> None:
    """Train in bf16 unless a test asks for something else, as on a GPU; the device stays the CPU."""
    try:
        from tunerkit_cli.machine import hardware
    except ImportError:  # without the extra [cli], nothing chooses a precision
        return
    own: Any = hardware.choose_precision

    @functools.wraps(own)
    def choose(device: torch.device, asked: str | None, **options: Any) -> str:
        return str(own(device, asked or ("bf16" if device.type == "cpu" else None), **options))

    hardware.choose_precision = choose


FORMS: dict[str, Callable[[], None]] = {
    "amx": lambda: _cpu(True),
    "no-amx": lambda: _cpu(False),
    "accelerator": _accelerator,
}
_is_set = False


def believe_() -> None:
    """Make torch and the command describe the named machine, once in each process."""
    global _is_set
    name = os.environ.get(VARIABLE)
    if name and name not in FORMS:
        raise ValueError(f"{VARIABLE} is {name}; expected one of {', '.join(FORMS)}")
    if name and not _is_set:
        FORMS[name]()
    _is_set = True
