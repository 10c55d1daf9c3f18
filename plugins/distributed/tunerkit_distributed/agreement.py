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
    """Raise `StepError` on every rank if the ranks' adapters differ or would diverge; else gather only 32 bytes.

    Args:
        tuners: The adapters of this rank.
        optimizer: The adapters' optimizer.

    Returns:
        The training's number in this process group, from 1, equal on all ranks.
    """
    if isinstance(optimizer, LBFGS):
        raise StepError(
            "LBFGS chooses its steps by the loss, which differs between processes, so their adapters would diverge; "
            "use another optimizer, or one process"
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
    """Whether rank 0 may broadcast the adapter's initial values; not if each rank's base was changed to fit its own."""
    return method_record(tuner.method).start == "exact"


@torch.no_grad()
def take_from_first_(tensors: Sequence[Tensor], what: str) -> None:
    """Overwrite tensors with rank 0's values, in one broadcast for each dtype and device.

    Args:
        tensors: Tensors of the same shapes on every rank.
        what: The tensors' name in messages.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        vector = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
        group.broadcast_(vector, what)
        unflatten_(vector, alike)


_ADVICE = "wrap with the same config, seed and base in all; to train independent adapters, pass data_parallel=False"


def _described(tuner: Tuner, optimizer: Optimizer | None) -> dict[str, str]:
    """Return the properties of an adapter's training that must be equal on all ranks, by their names in messages.

    The seed is compared as the user passed it. Without one, initial values differ, and rank 0 broadcasts its own.
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
    """Return a digest of each parameter's sum and sum of squares; leave out shards, which always differ."""
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
    """Return each distinct value with its ranks, for a message."""
    owners: dict[str, list[str]] = {}
    for number, value in enumerate(values):
        owners.setdefault(value, []).append(str(number))
    return "; ".join(f"{cut(value, 120)} in process {', '.join(own[:5])}" for value, own in owners.items())
