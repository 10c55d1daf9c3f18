"""Base weights of which FSDP2 leaves each process a part: where they can be merged into, and where not."""

from collections.abc import Iterable

from torch import Tensor, nn

from tunerkit import libraries, parallel
from tunerkit.errors import AdapterError
from tunerkit.injection import Slots


def is_split(module: nn.Module) -> bool:
    """Whether this process holds only a part of a module, as FSDP2 leaves it."""
    return any(parallel.is_split(parameter) for parameter in module.parameters())


def refuse_gathered(places: Iterable[tuple[str, nn.Module, Slots]]) -> None:
    """Raise `AdapterError` if FSDP2 has gathered weights for a while: what is merged into these would be lost."""
    for path, module, _ in places:
        if libraries.torch_private.is_managed_by_fsdp2(module) and not is_split(module):
            raise AdapterError(
                f"cannot merge into {path!r}: FSDP2 keeps its weight whole after a forward, and shards it in a module "
                "around this model; call it on the module that was passed to fully_shard"
            )


def refuse_packed_shards(places: Iterable[tuple[str, nn.Module, Slots]]) -> None:
    """Raise `AdapterError` if FSDP2 has cut a packed weight: its library can read and write whole ones alone."""
    for path, module, slots in places:
        if slots.active and has_packed_weight(slots) and is_split(module):
            raise AdapterError(
                f"cannot merge into {path!r}: its weight is quantised, and FSDP2 has cut it into shards, which cannot "
                "be read alone. Save the adapter, load it onto the base in one process, and merge there"
            )


def own_value(tensor: Tensor) -> Tensor:
    """The values that this process holds: of shards, which are written in place, a copy."""
    return parallel.local_part(tensor).clone() if parallel.is_split(tensor) else tensor.data


def has_packed_weight(slots: Slots) -> bool:
    """Whether a quantiser stores the weight of a module."""
    return slots.base is not None and slots.base.packing is not None
