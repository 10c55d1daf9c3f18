"""Base weights of which an engine leaves each process a part: where they can be merged into, and where not."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tunerkit import hooks, libraries
from tunerkit.errors import AdapterError
from tunerkit.extras import ENGINES, install
from tunerkit.injection import Slots
from tunerkit.records import Sharding


def is_split(module: nn.Module) -> bool:
    """Whether this process holds only a part of a module, as an engine leaves it."""
    return any(_sharding(parameter) is not None for parameter in module.parameters())


def _sharding(tensor: Tensor) -> Sharding | None:
    """How a tensor is cut; None if it is whole. Raises `AdapterError` if it is cut, and no plugin knows how."""
    if type(tensor) in (Tensor, nn.Parameter):  # nearly always, and asking all plugins takes long
        return None
    found = next((each for each in hooks.gather_shardings() if each.is_cut(tensor)), None)
    if found is None and isinstance(tensor, nn.Parameter) and libraries.is_sharded(tensor):
        raise AdapterError(
            f"a weight is a {type(tensor).__name__}, of which this process holds a part, and no installed plugin can "
            f"put it together: {install(ENGINES)}"
        )
    return found


def part_of(tensor: Tensor) -> Tensor | None:
    """What this process holds of a tensor that is cut: the memory itself; None if it is whole."""
    found = _sharding(tensor)
    return None if found is None else found.part(tensor)


def reshard_(model: nn.Module) -> None:
    """Cut what a forward has left whole in ``model``."""
    for each in hooks.gather_shardings():
        each.reshard_(model)


@contextmanager
def gathered(module: nn.Module) -> Iterator[Callable[[str, Tensor], Tensor]]:
    """Inside the block, the parameters of a module that is split are whole. See `Sharding`."""
    found = next(each for parameter in module.parameters() if (each := _sharding(parameter)) is not None)
    with found.gathered(module) as part:
        yield part


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
    part = part_of(tensor)
    return tensor.data if part is None else part.clone()


def has_packed_weight(slots: Slots) -> bool:
    """Whether a quantiser stores the weight of a module."""
    return slots.base is not None and slots.base.packing is not None
