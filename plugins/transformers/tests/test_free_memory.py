"""What memory is free, by device."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tunerkit_transformers import free_memory
from tunerkit_transformers.free_memory import GIB, fits, free_bytes

CPU = torch.device("cpu")


def test_a_cpu_has_what_is_available_within_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's, the container's, which may be 'max', and the user's own, of which the process has taken a part."""
    taken = psutil.Process().memory_info().rss
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(free_memory, "_LIMITS", (limit, tmp_path / "none"))
    assert free_bytes(CPU) == 64 * GIB
    limit.write_text("max\n")
    assert free_bytes(CPU) == 64 * GIB
    limit.write_text(f"{32 * GIB}\n")
    assert free_bytes(CPU) == pytest.approx(32 * GIB - taken, rel=0.01)
    assert free_bytes(CPU, 16 * GIB) == pytest.approx(16 * GIB - taken, rel=0.01)


def test_a_gpu_has_what_is_free_and_what_torch_has_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than that if the user says so; another accelerator does not say it."""
    for name, value in {"mem_get_info": (5, 80), "memory_reserved": 9, "memory_allocated": 7}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    cuda = torch.device("cuda")
    assert free_bytes(cuda) == 7
    assert free_bytes(cuda, 10) == 3
    assert free_bytes(torch.device("mps")) is None


def test_a_step_fits_with_room_to_spare() -> None:
    """A fifth is left free, and without knowledge everything fits."""
    assert fits(80, 100)
    assert not fits(81, 100)
    assert fits(10**15, None)
