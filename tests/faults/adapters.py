"""The adapters whose files are damaged, and whose saves are killed: toy methods, LoRA and AdaLoRA."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_testing import small
from tunerkit_testing.toy_methods import LowRankPlugin, ShiftPlugin

TARGETS = ("0", "2")
FILE = "adapter.safetensors"


@functools.cache
def kinds() -> tuple[str, ...]:
    """The toy methods, which are registered here, and what of LoRA and AdaLoRA is installed."""
    for plugin in (LowRankPlugin(), ShiftPlugin()):
        tunerkit.register(plugin)
    return ("toy-low-rank", "toy-shift", *(name for name in ("lora", "adalora") if name in tunerkit.methods()))


def net() -> nn.Module:
    """Return the base model, the same at each call: (N, 6) to (N, 3)."""
    return small.net().eval()


def output(model: nn.Module) -> Tensor:
    """Return the model's output for a fixed batch."""
    with torch.no_grad():
        found: Tensor = model.eval()(small.X.to(next(model.parameters()).dtype))
    return found


def config_of(kind: str, rank: int = 2) -> dict[str, Any]:
    """Return a config of a method for `net`."""
    if kind == "adalora":
        return {"targets": list(TARGETS), "target_rank": rank, "init_rank": 2 * rank + 1, "t_init": 2, "t_final": 4}
    return {"targets": list(TARGETS), **({} if kind == "toy-shift" else {"rank": rank})}


def trained(kind: str, seed: int = 0, *, rank: int = 2) -> nn.Module:
    """Return a wrapped base whose adapter has random values; pruned triplets stay 0."""
    model = tunerkit.wrap(net(), kind, config_of(kind, rank), seed=seed)
    if kind == "adalora":
        optimizer = torch.optim.SGD(small.trainable(model), lr=0.5)
        tunerkit.attach(model, optimizer, total_steps=12)
        small.train(model.train(), optimizer, 12)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tunerkit.tuner(model).named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (parameter != 0) if name.endswith(".lam") else noise)
    return model.eval()


def wrong_error(error: Exception) -> str:
    """Return an empty text if an error is a proper refusal, else what is wrong with it."""
    if not isinstance(error, tunerkit.TunerkitError):
        return f"{type(error).__name__}, which is no TunerkitError: {str(error)[:200]!r}"
    return "" if 0 < len(str(error)) <= 10_000 else f"a message of {len(str(error))} characters"


def warm_up() -> None:
    """Do everything once: what is imported or compiled at the first use would cost each fork seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds():
            tunerkit.save(trained(kind), Path(folder))
            tunerkit.unmerge(tunerkit.merge(tunerkit.load(net(), folder)))
