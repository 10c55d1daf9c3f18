"""What an adapter's training must have in common in all processes, in the form that engines compare."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from tunerkit import hooks
from tunerkit.config import unstructure
from tunerkit.engine import Held
from tunerkit.injection import Tuner


def held_of(tuner: Tuner, total_steps: int | None, optimizer: Optimizer | None) -> Held:
    """Describe an adapter that is about to be trained for ``total_steps`` by ``optimizer``.

    The seed is compared only as it was given. Without one, processes start differently, and take process 0's start.
    """
    slots = dict(tuner.slots())
    starts_at_0 = hooks.registry.get(tuner.method).start == "exact"
    described = {
        "method": tuner.method,
        **{f"setting {name}": repr(value) for name, value in unstructure(tuner.config).items()},
        "seed": str(tuner.progress.seed),
        "start": "a file" if tuner.loaded else "its own",
        "length of training": str(total_steps),
        "optimizer": _settings(optimizer),
        "steps so far": str(tuner.steps),
        "adapted modules": _digest([*slots]),
        "shapes": _digest([[name, [*p.shape], str(p.dtype)] for name, p in tuner.named_parameters()]),
        "base": _digest(tuner.progress.noted),
    }
    if tuner.loaded or not starts_at_0:
        described["weights"] = _sums(tuner.parameters())
    return Held(tuner.name, tuner.model, slots, described, starts_alike=starts_at_0)


def _settings(optimizer: Optimizer | None) -> str:
    """The optimizer's class, and the numbers that each of its groups trains with."""
    groups = [] if optimizer is None else optimizer.param_groups
    numbers = [
        {name: float(value) for name, value in each.items() if isinstance(value, int | float)} for each in groups
    ]
    return f"{type(optimizer).__name__} {numbers}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


@torch.no_grad()
def _sums(parameters: Iterable[nn.Parameter]) -> str:
    """Two sums over all values, which differ if the values do; FSDP2's and ZeRO-3's shards differ in any case."""
    plain = [p for p in parameters if type(p.data) is torch.Tensor and p.numel()]
    sums = [torch.stack([p.double().sum(), p.double().square().sum()]).cpu() for p in plain]
    return _digest([[round(float(each), 9) for each in pair] for pair in sums])
