"""The scan of a model: its modules by path and as base layers, its tied parameters, its output heads."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import attrs
from torch import nn

from tunerkit.errors import TargetError
from tunerkit.layers import BaseLayer, Knowledge, as_base_layers
from tunerkit.libraries import (
    CONV1D,
    derives_from,
    forward_name,
    identity,
    is_head_name,
    named_heads,
    torch_private,
    whole_shape,
)
from tunerkit.paths import CHILD, is_number, join


@attrs.frozen(eq=False)
class ScannedModule:
    """A module of the model.

    Attributes:
        paths: Every path at which the module is registered.
        module: The module.
        base: The module as a base layer; None if no kind matches it.
        reading_owner: The first of the modules that hold it whose forward uses its weight directly, bypassing its own.
        read_and_called: Whether there is one, and another module that holds it may call it.
        inside_attention: Whether an ``nn.MultiheadAttention`` holds it whose forward is not torch's.
        layer: The first number in its first path: the index of its block.
        in_head: Whether it is an output head or inside one.
    """

    paths: tuple[str, ...]
    module: nn.Module
    base: BaseLayer | None
    reading_owner: nn.Module | None
    read_and_called: bool
    inside_attention: bool
    layer: int | None
    in_head: bool

    @property
    def path(self) -> str:
        """The first path, by which the module is called in results and messages."""
        return self.paths[0]

    @property
    def reader(self) -> nn.Module | None:
        """The module whose forward uses this base layer's weight directly; None if the layer is called."""
        if self.base is None:
            return None
        return self.module if self.base.lends else self.reading_owner


@attrs.frozen(eq=False)
class Scan:
    """What selection and injection need to know of a model, collected once. Adapters in it are left out.

    Attributes:
        root: The model itself.
        modules: The modules inside it, in its order.
        by_path: The modules by each of their paths; the root has an empty path.
        sharers: For the id of each tied parameter, the full names under which modules hold it.
        default_names: The default targets of its architecture; empty if there are none.
        unloaded: Whether weights on the meta device are no obstacle, since the model will not run: an adapter is read
            to be written in another format, and its own tensors are on the CPU.
    """

    root: ScannedModule
    modules: tuple[ScannedModule, ...]
    by_path: Mapping[str, ScannedModule]
    sharers: Mapping[int, tuple[str, ...]]
    default_names: tuple[str, ...]
    unloaded: bool = False


_DEEPEST = 500  # parts of a path: a model that contains itself has no end


class _Registration(NamedTuple):
    """A module at one of its paths; ``read`` names the children whose weights its owner's forward uses directly."""

    path: str
    module: nn.Module
    owner: nn.Module | None = None
    read: tuple[str, ...] = ()
    layer: int | None = None
    in_head: bool = False


def scan(model: nn.Module, knowledge: Knowledge, *, unloaded: bool = False) -> Scan:
    """Scan ``model``. The base-layer kind of each module is determined once. See `Scan` for ``unloaded``."""
    places: dict[int, list[_Registration]] = defaultdict(list)
    for registration in _registrations(model, knowledge):
        places[id(registration.module)].append(registration)
    bases = as_base_layers([found[0].module for found in places.values()], knowledge)
    root, *modules = (_scanned(found, bases.get(found[0].module)) for found in places.values())
    return Scan(
        root=root,
        modules=tuple(modules),
        by_path={path: scanned for scanned in (root, *modules) for path in scanned.paths},
        sharers=tied((scanned.path, scanned.module) for scanned in (root, *modules)),
        default_names=_default_names(model, knowledge),
        unloaded=unloaded,
    )


def _default_names(model: nn.Module, knowledge: Knowledge) -> tuple[str, ...]:
    match model:
        case nn.Module(config=object(model_type=str(model_type))):
            return next((known.names for known in knowledge.default_targets if model_type in known.model_types), ())
    return ()


def _registrations(model: nn.Module, knowledge: Knowledge) -> Iterator[_Registration]:
    """Every module at each of its paths, in the model's order, without the modules of adapters."""
    readers = {reader.owner: reader.children for reader in reversed(knowledge.weight_readers)}
    # Any module may name a head that lies elsewhere, so all are asked first.
    heads = {id(head) for module in model.modules() for head in named_heads(module)}
    waiting = [_Registration("", model)]
    while waiting:
        place = waiting.pop()
        yield place
        if not (children := torch_private.own_children(place.module)):
            continue
        if place.path.count(".") > _DEEPEST:
            raise TargetError(f"the model contains itself, at {place.path[:80]!r}...; remove that module from it")
        read, prefix = readers.get(forward_name(place.module), ()), f"{place.path}." if place.path else ""
        # In reverse, since the end of the list is visited next.
        for name, child in reversed(children.items()):
            if child is not None and name != CHILD:
                layer = int(name) if place.layer is None and is_number(name) else place.layer
                # A name counts only outside numbered blocks: inside one, "head" names a part of its attention.
                in_head = place.in_head or id(child) in heads or (layer is None and is_head_name(name))
                waiting.append(_Registration(prefix + name, child, place.module, read, layer, in_head))


def _scanned(places: Sequence[_Registration], base: BaseLayer | None) -> ScannedModule:
    first = places[0]
    readers = [place.owner for place in places if place.path.rpartition(".")[2] in place.read]
    return ScannedModule(
        paths=tuple([place.path for place in places]),
        module=first.module,
        base=base,
        reading_owner=readers[0] if readers else None,
        read_and_called=bool(readers) and len({place.owner for place in places}) > 1,
        inside_attention=any(isinstance(place.owner, nn.MultiheadAttention) and not place.read for place in places),
        layer=first.layer,
        in_head=any(place.in_head for place in places),
    )


def is_linear(module: nn.Module) -> bool:
    """Whether ``"all-linear"`` includes this module: nn.Linear, attention, Conv1D, or one with in and out features."""
    match module:
        case nn.Linear() | nn.MultiheadAttention() | nn.Module(in_features=int(), out_features=int()):
            return True
    return derives_from(module, CONV1D)


def may_be_linear(module: nn.Module) -> bool:
    """Whether a user may expect ``"all-linear"`` to include this module, such as a router with its own matrix."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm) or torch_private.is_convolution(module):
        return False
    weight = torch_private.own_parameters(module).get("weight")
    return (weight is not None and len(whole_shape(weight)) == 2) or is_linear(module)


def default_convolutions(scanned: Scan) -> tuple[ScannedModule, ...]:
    """The convolutions in the numbered blocks of a model, if these hold no linear layer; else none.

    If no numbered block holds a convolution, the whole model except its head is searched instead. Depthwise
    convolutions are left out: their matrix is as narrow as one kernel, so a low rank saves nothing.
    """
    body = [each for each in scanned.modules if not each.in_head]
    for part in ([each for each in body if each.layer is not None], body):
        if found := tuple(each for each in part if _is_wide_convolution(each.module)):
            return () if any(is_linear(each.module) for each in part) else found
    return ()


def _is_wide_convolution(module: nn.Module) -> bool:
    return torch_private.is_convolution(module) and (module.groups == 1 or module.groups < module.in_channels)


def tied(modules: Iterable[tuple[str, nn.Module]]) -> Mapping[int, tuple[str, ...]]:
    """The full names of each tied parameter by its id; ``modules`` are pairs of path and module, each module once."""
    names: dict[int, list[str]] = defaultdict(list)
    keys: dict[int, int] = {}
    for path, module in modules:
        for name, parameter in torch_private.own_parameters(module).items():
            if parameter is not None:
                key = keys[id(parameter)] = identity(module, name, parameter)
                names[key].append(join(path, name))
    return {own: tuple(names[key]) for own, key in keys.items() if len(names[key]) > 1}
