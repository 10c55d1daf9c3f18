"""Compare what the processes of a training are about to train, before the first step."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.optim import LBFGS, Optimizer

from tunerkit import hooks, unstructure
from tunerkit.errors import StepError, cut
from tunerkit.plugin import Tuner
from tunerkit_distributed import group
from tunerkit_distributed.flat import unflatten_

_WHAT = "the comparison of the adapters at attach"
_begun: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # how many trainings, by the default group


def refuse_differing(tuners: Sequence[Tuner], optimizer: Optimizer | None) -> int:
    """Raise `StepError` in every process if they are about to train different adapters, or would drift apart.

    It costs one collective of 32 bytes if they agree.

    Args:
        tuners: The adapters of this process.
        optimizer: What steps them.

    Returns:
        The number of the training in this process group, from 1: all processes begin each at the same time.
    """
    if isinstance(optimizer, LBFGS):
        raise StepError(
            "LBFGS chooses its steps by the loss, and each process has another one: they would drift apart. Use "
            "another optimizer, or one process"
        )
    described = {tuner.name: _described(tuner, optimizer) for tuner in tuners}
    text = json.dumps(described)
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    found = group.gather(digest.to(group.device()), _WHAT)
    if all(torch.equal(each, found[0]) for each in found):
        _begun[distributed.group.WORLD] = number = _begun.get(distributed.group.WORLD, 0) + 1
        return number
    everybody = [json.loads(each) for each in group.gather_text(text, _WHAT)]
    lines = [*_names(everybody), *_differences(everybody)]
    raise StepError("\n- ".join(["the processes of this training did not wrap alike:", *lines, _ADVICE]))


def starts_alike(tuner: Tuner) -> bool:
    """Whether the start may be taken from process 0. It may not if the base was changed to fit it."""
    return hooks.registry.get(tuner.method).start == "exact"


@torch.no_grad()
def take_from_first_(tensors: Sequence[Tensor], what: str) -> None:
    """Overwrite tensors with those of process 0: one broadcast for each dtype and device.

    Args:
        tensors: Tensors of the same shapes in every process.
        what: What they are, for messages.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        vector = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
        group.broadcast_(vector, what)
        unflatten_(vector, alike)


_ADVICE = "wrap with the same config, seed and base in all; if these are trainings of their own, data_parallel=False"


def _described(tuner: Tuner, optimizer: Optimizer | None) -> dict[str, str]:
    """What an adapter's training must have in common in all processes, by what messages call it.

    The seed is compared only as it was given. Without one, processes start differently, and take process 0's start.
    """
    progress, groups = tuner.progress, [] if optimizer is None else optimizer.param_groups
    numbers = [
        {name: float(value) for name, value in each.items() if isinstance(value, int | float)} for each in groups
    ]
    described = {
        "method": tuner.method,
        **{f"setting {name}": repr(value) for name, value in unstructure(tuner.config).items()},
        "seed": str(progress.seed),
        "start": "a file" if progress.loaded else "its own",
        "length of training": str(tuner.total_steps),
        "optimizer": f"{type(optimizer).__name__} {numbers}",
        "steps so far": str(tuner.steps),
        "adapted modules": _digest([place.path for place in (*tuner.targets, *tuner.copies, *tuner.biases)]),
        "shapes": _digest([[name, [*p.shape], str(p.dtype)] for name, p in tuner.named_parameters()]),
        "base": _digest(progress.noted),
    }
    if progress.loaded or not starts_alike(tuner):
        described["weights"] = _sums(tuner.parameters())
    return described


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


@torch.no_grad()
def _sums(parameters: Iterable[Tensor]) -> str:
    """Two sums over all values, which differ if the values do; FSDP2's and ZeRO-3's shards differ in any case."""
    plain = [p for p in parameters if type(p.data) is Tensor and p.numel()]
    sums = [torch.stack([p.double().sum(), p.double().square().sum()]).cpu() for p in plain]
    return _digest([[round(float(each), 9) for each in pair] for pair in sums])


def _names(everybody: Sequence[Mapping[str, Mapping[str, str]]]) -> list[str]:
    names = [", ".join(described) for described in everybody]
    return [] if len(set(names)) == 1 else [f"adapters: {_listed(names)}"]


def _differences(everybody: Sequence[Mapping[str, Mapping[str, str]]]) -> list[str]:
    found = []
    for name in everybody[0]:
        if not all(name in described for described in everybody):
            continue
        keys = dict.fromkeys(key for described in everybody for key in described[name])
        for key in keys:
            values = [described[name].get(key, "none") for described in everybody]
            if len(set(values)) > 1:
                found.append(f"adapter {name!r}, {key}: {_listed(values)}")
    return found


def _listed(values: Sequence[str]) -> str:
    """Each value with the processes that have it."""
    owners: dict[str, list[str]] = {}
    for number, value in enumerate(values):
        owners.setdefault(value, []).append(str(number))
    return "; ".join(f"{cut(value, 120)} in process {', '.join(own[:5])}" for value, own in owners.items())
