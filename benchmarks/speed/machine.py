"""The context of a run that a reader needs: date, versions, and the kind of machine."""

import datetime
import importlib.util
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.speed.models import ATTENTION
from benchmarks.speed.settings import GAMMA, Settings

PACKAGES = ("torch", "transformers", "peft", "tunerkit", "tunerkit-lora", "tunerkit-adalora")
OPTIONAL = ("bitsandbytes", "liger-kernel", "triton")  # which some forms of the part `gpu` need


def header(settings: Settings) -> dict[str, object]:
    """Names and values for the header of the report, without host names and paths."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **(gpu() if torch.cuda.is_available() else {"GPU": "none"}),
        "load before": round(os.getloadavg()[0], 2),
        "pairs": f"{settings.pairs} after {settings.warmup} untimed",
        "batch": f"{settings.batch} x {settings.tokens} tokens, attention {ATTENTION}, no dropout",
        "ranks": f"{settings.init_rank} at the start, AdaLoRA down to {settings.target_rank}",
        "AdaLoRA": f"Δ_T {settings.delta_t}, γ 0 or {GAMMA}; PEFT's γ {GAMMA}",
        "optimizer": "AdamW, fused",
        "seed": settings.seed,
    }


def gpu() -> dict[str, object]:
    """The card, its memory, its driver and CUDA."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "GPU": torch.cuda.get_device_name(),
        "GPU memory": f"{memory:.0f} GiB",
        "driver": driver,
        "CUDA": torch.version.cuda,
        **{name: version(name) for name in OPTIONAL if importlib.util.find_spec(name.replace("-", "_")) is not None},
    }


def processor() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
