"""The scan of a model: its modules by path and as base layers, its tied parameters, its output heads."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Final, NamedTuple

import attrs
from torch import nn

from tunerkit.errors import TargetError, closest, first, shown
from tunerkit.layers import BaseLayer, Knowledge, as_base_layers, forward_name, torch_private, weights
from tunerkit.paths import CHILD, is_number, join
from tunerkit.records import Target

SEARCHED: Final = 8  # mistyped names for which the closest ones are searched
_DEEPEST: Final = 500  # parts of a path: a model that contains itself has no end

# What output heads are called. "proj_out" is missing on purpose: in diffusion models the name stands for an ordinary
# projection.
_HEADS = frozenset({"head", "lm_head", "score", "classifier", "qa_outputs", "cls", "embed_out", "predictions"})
_HEADS |= {"pre_classifier", "vocab_transform", "vocab_projector", "logits_proj"}
_ENDINGS = ("_head", "_heads", "_classifier", "_predictions")


@attrs.frozen(eq=False)
class ScannedModule:
    """A module of the model."""

    path: str  # the first at which it is registered, its name in results and messages
    paths: tuple[str, ...]  # all of these
    module: nn.Module
    base: BaseLayer | None  # None if no kind matches it
    reading_owner: nn.Module | None  # the first of its holders whose forward uses its weight directly
    read_and_called: bool  # whether there is one, and another holder may call it
    inside_attention: bool  # whether an nn.MultiheadAttention holds it whose forward is not torch's
    layer: int | None  # the first number in its first path: the index of its block
    in_head: bool  # whether it is an output head or inside one
    in_block: bool  # whether it is in a numbered block; a head may number its layers too, most often in a Sequential

    @property
    def reader(self) -> nn.Module | None:
        """The module whose forward uses this base layer's weight directly; None if the layer is called."""
        if self.base is None:
            return None
        return self.module if self.base.lends else self.reading_owner


@attrs.frozen(eq=False)
class Scan:
    """What selection and injection need to know of a model, collected once. Adapters in it are left out."""

    root: ScannedModule  # the model itself
    modules: tuple[ScannedModule, ...]  # inside it, in its order
    by_path: Mapping[str, ScannedModule]  # by each of their paths; the root has an empty one
    sharers: Mapping[int, tuple[str, ...]]  # for the id of each tied parameter, its full names
    knowledge: Knowledge
    unloaded: bool = False  # whether the model will not run, so that weights on the meta device are no obstacle


class _Registration(NamedTuple):
    """A module at one of its paths; ``read`` names the children whose weights its owner's forward uses directly."""

    path: str
    module: nn.Module
    owner: nn.Module | None = None
    read: tuple[str, ...] = ()
    layer: int | None = None
    in_head: bool = False
    in_block: bool = False


def scan(model: nn.Module, knowledge: Knowledge, *, unloaded: bool = False) -> Scan:
    """Scan ``model``. The base-layer kind of each module is determined once. See `Scan` for ``unloaded``."""
    places: dict[int, list[_Registration]] = defaultdict(list)
    for registration in _registrations(model, knowledge):
        places[id(registration.module)].append(registration)
    bases = as_base_layers([found[0].module for found in places.values()], knowledge)
    root, *modules = [_scanned(found, bases.get(found[0].module)) for found in places.values()]
    return Scan(
        root=root,
        modules=tuple(modules),
        by_path={path: scanned for scanned in (root, *modules) for path in scanned.paths},
        sharers=tied([(scanned.path, scanned.module) for scanned in (root, *modules)]),
        knowledge=knowledge,
        unloaded=unloaded,
    )


def _registrations(model: nn.Module, knowledge: Knowledge) -> Iterator[_Registration]:
    """Every module at each of its paths, in the model's order, without the modules of adapters."""
    readers = {reader.owner: reader.children for reader in reversed(knowledge.weight_readers)}
    # Any module may name a head that lies elsewhere, so all are asked first.
    asked = [library.heads for library in knowledge.libraries]
    heads = {id(head) for module in model.modules() for named in asked for head in named(module)}
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
                layer, in_block = place.layer, place.in_block
                if layer is None and is_number(name):
                    layer, in_block = int(name), not isinstance(place.module, nn.Sequential)
                # A name counts only outside numbered blocks: inside one, "head" names a part of its attention.
                named = layer is None and (name in _HEADS or name.endswith(_ENDINGS))
                in_head = place.in_head or named or id(child) in heads
                waiting.append(_Registration(prefix + name, child, place.module, read, layer, in_head, in_block))


def _scanned(places: Sequence[_Registration], base: BaseLayer | None) -> ScannedModule:
    main, in_head = places[0], any(place.in_head for place in places)
    readers = [place.owner for place in places if place.path.rpartition(".")[2] in place.read]
    return ScannedModule(
        path=main.path,
        paths=tuple([place.path for place in places]),
        module=main.module,
        base=base,
        reading_owner=readers[0] if readers else None,
        read_and_called=bool(readers) and len({place.owner for place in places}) > 1,
        inside_attention=any(isinstance(place.owner, nn.MultiheadAttention) and not place.read for place in places),
        layer=main.layer,
        in_head=in_head,
        in_block=main.in_block and not in_head,
    )


def from_paths(scanned: Scan, paths: Sequence[str]) -> tuple[Target, ...]:
    """The modules at exact paths, such as an adapter file's, in their order. Raises `TargetError` for missing ones."""
    missing = [path for path in paths if not path or path not in scanned.by_path]
    if missing:
        # Searching for the closest names is slow, and a model of another architecture lacks every path.
        hints = [closest(path, scanned.by_path) for path in missing[:SEARCHED]]
        problems = [f"no module named {shown(path)}{hint}" for path, hint in zip_longest(missing, hints, fillvalue="")]
        raise TargetError("\n".join(first(problems)))
    return tuple([Target(path, scanned.by_path[path].module) for path in paths])


def tied(modules: Iterable[tuple[str, nn.Module]]) -> Mapping[int, tuple[str, ...]]:
    """The full names of each tied parameter by its id; ``modules`` are pairs of path and module, each module once."""
    names: dict[int, list[str]] = defaultdict(list)
    keys: dict[int, int] = {}
    for path, module in modules:
        for name, parameter in torch_private.parameters_of(module).items():
            key = keys[id(parameter)] = weights.identity(module, name, parameter)
            names[key].append(join(path, name))
    return {own: tuple(names[key]) for own, key in keys.items() if len(names[key]) > 1}
