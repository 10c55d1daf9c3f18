"""Compare the adapters of all ranks at attach, before the first step."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.optim import LBFGS, Optimizer

from tunerkit import unstructure
from tunerkit.errors import StepError, cut
from tunerkit.plugin import Tuner, method_record
from tunerkit_distributed import group
from tunerkit_distributed.flat import unflatten_

_WHAT = "the comparison of the adapters at attach"
_begun: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # the number of trainings, by the default group


def refuse_differing(tuners: Sequence[Tuner], optimizer: Optimizer | None) -> int:
    """Raise `StepError` on every rank if their adapters differ, or would diverge. One collective of 32 bytes if not.

    Args:
        tuners: The adapters of this rank.
        optimizer: Their optimizer.

    Returns:
        The number of the training in this process group, from 1; it is the same on all ranks.
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
    """Whether the start may be broadcast from rank 0; not if the base was changed to compensate for it."""
    return method_record(tuner.method).start == "exact"


@torch.no_grad()
def take_from_first_(tensors: Sequence[Tensor], what: str) -> None:
    """Overwrite tensors with those of rank 0: one broadcast for each dtype and device.

    Args:
        tensors: Tensors of the same shapes on every rank.
        what: Their name in messages.
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
    """The properties of an adapter's training that must be equal on all ranks, by their names in messages.

    The seed is compared as it was passed: without one, ranks start differently, and rank 0's start is broadcast.
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
    """A digest of two sums over all values. Shards of FSDP2 and ZeRO-3 are left out: they always differ."""
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
    """Each value with its ranks."""
    owners: dict[str, list[str]] = {}
    for number, value in enumerate(values):
        owners.setdefault(value, []).append(str(number))
    return "; ".join(f"{cut(value, 120)} in process {', '.join(own[:5])}" for value, own in owners.items())
