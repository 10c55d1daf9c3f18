"""Compare what the processes of a training are about to train, before the first step."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed

from tunerkit.errors import StepError, cut
from tunerkit.hooks import Held
from tunerkit_distributed import group
from tunerkit_distributed.flat import unflatten_

_WHAT = "the comparison of the adapters at attach"
_begun: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # how many trainings, by the default group


def refuse_differing(adapters: Sequence[Held]) -> int:
    """Raise `StepError` in every process if they are about to train different adapters.

    It costs one collective of 32 bytes if they agree.

    Args:
        adapters: The adapters of this process.

    Returns:
        The number of the training in this process group, from 1: all processes begin each at the same time.
    """
    described = {held.name: dict(held.described) for held in adapters}
    text = json.dumps(described)
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    found = group.gather(digest.to(group.device()), _WHAT)
    if all(torch.equal(each, found[0]) for each in found):
        _begun[distributed.group.WORLD] = number = _begun.get(distributed.group.WORLD, 0) + 1
        return number
    everybody = [json.loads(each) for each in group.gather_text(text, _WHAT)]
    lines = [*_names(everybody), *_differences(everybody)]
    raise StepError("\n- ".join(["the processes of this training did not wrap alike:", *lines, _ADVICE]))


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
