"""The scan of a model: its modules and base layers by path, tied parameters and output heads."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Final, NamedTuple

import attrs
from torch import nn

from tunerkit.errors import TargetError, closest, first, shown
from tunerkit.layers import BaseLayer, Knowledge, as_base_layers, forward_name, torch_private, weights
from tunerkit.paths import CHILD, is_number, join
from tunerkit.records import ModelLibrary, Target

SEARCHED: Final = 8  # mistyped names for which the closest ones are searched
_DEEPEST: Final = 500  # parts of a path, to detect a model that contains itself

# Names of output heads. "proj_out" is missing on purpose: in diffusion models it is an ordinary projection.
_HEADS = frozenset({"head", "lm_head", "score", "classifier", "qa_outputs", "cls", "embed_out", "predictions"})
_HEADS |= {"pre_classifier", "vocab_transform", "vocab_projector", "logits_proj"}
_ENDINGS = ("_head", "_heads", "_classifier", "_predictions")


@attrs.frozen(eq=False)
class ScannedModule:
    """A module of a scanned model: its paths, its base layer, its parents, and its position in blocks and heads."""

    path: str  # the first at which it is registered, for results and messages
    paths: tuple[str, ...]  # all paths at which it is registered
    names: tuple[str, ...]  # what patterns match: its paths, and of a stack also those of its parameter
    module: nn.Module
    base: BaseLayer | None  # None if no kind matches it
    reading_owner: nn.Module | None  # the first parent whose forward uses its weight directly
    read_and_called: bool  # whether there is such a parent, and another parent may call the module
    inside_attention: bool  # whether it is a child of an nn.MultiheadAttention whose forward is not torch's
    layer: int | None  # the first number in its first path: the index of its block
    in_head: bool  # whether it is an output head or inside one
    in_block: bool  # whether it is in a numbered block; numbers in a Sequential, as in many heads, do not count

    @property
    def reader(self) -> nn.Module | None:
        """The module whose forward uses this base layer's weight directly; None if the layer is called."""
        if self.base is None:
            return None
        return self.module if self.base.lends else self.reading_owner


@attrs.frozen(eq=False)
class Scan:
    """The facts about a model that selection and injection need, collected once, without the model's adapters."""

    root: ScannedModule  # the model itself
    modules: tuple[ScannedModule, ...]  # all other modules, in the model's order
    by_path: Mapping[str, ScannedModule]  # under each of their paths; the root's path is ""
    sharers: Mapping[int, tuple[str, ...]]  # the full names of each tied parameter, by its id
    knowledge: Knowledge
    libraries: Sequence[ModelLibrary]  # those that apply to the model
    unloaded: bool = False  # whether the model will not run, so that weights may be on the meta device


class _Registration(NamedTuple):
    """A module at one of its paths; ``read`` names the owner's children whose weights the owner uses directly."""

    path: str
    module: nn.Module
    owner: nn.Module | None = None
    read: tuple[str, ...] = ()
    layer: int | None = None
    in_head: bool = False
    in_block: bool = False


def scan(model: nn.Module, knowledge: Knowledge, *, unloaded: bool = False) -> Scan:
    """Return the scan of ``model``; with ``unloaded``, weights may be on the meta device."""
    places: dict[int, list[_Registration]] = defaultdict(list)
    libraries = [each for each in knowledge.libraries if each.applies(model)]
    for registration in _registrations(model, knowledge, libraries):
        places[id(registration.module)].append(registration)
    bases = as_base_layers([found[0].module for found in places.values()], knowledge)
    root, *modules = [_scanned(found, bases.get(found[0].module), places) for found in places.values()]
    return Scan(
        root=root,
        modules=tuple(modules),
        by_path={path: scanned for scanned in (root, *modules) for path in scanned.paths},
        sharers=tied([(scanned.path, scanned.module) for scanned in (root, *modules)]),
        knowledge=knowledge,
        libraries=libraries,
        unloaded=unloaded,
    )


def _registrations(
    model: nn.Module, knowledge: Knowledge, libraries: Iterable[ModelLibrary]
) -> Iterator[_Registration]:
    """Yield every module at each of its paths, in the model's order, without the modules of adapters."""
    readers = {reader.owner: reader.children for reader in reversed(knowledge.weight_readers)}
    # Collected first, since a module may declare a head in another part of the model.
    asked = [library.heads for library in libraries]
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
        for name, child in reversed(children.items()):  # the end of the list is visited next
            if child is not None and name != CHILD:
                layer, in_block = place.layer, place.in_block
                if layer is None and is_number(name):
                    layer, in_block = int(name), not isinstance(place.module, nn.Sequential)
                # Names count only outside numbered blocks: inside a block, "head" may be a part of attention.
                named = layer is None and (name in _HEADS or name.endswith(_ENDINGS))
                in_head = place.in_head or named or id(child) in heads
                waiting.append(_Registration(prefix + name, child, place.module, read, layer, in_head, in_block))


def _scanned(
    places: Sequence[_Registration], base: BaseLayer | None, everywhere: Mapping[int, Sequence[_Registration]]
) -> ScannedModule:
    main, in_head = places[0], any(place.in_head for place in places)
    held = everywhere[id(base.holder)] if base is not None and base.stack else ()
    paths = tuple([place.path for place in places])
    readers = [place.owner for place in places if place.path.rpartition(".")[2] in place.read]
    return ScannedModule(
        path=main.path,
        paths=paths,
        names=(*paths, *[join(place.path, base.weight_name) for place in held if base]),
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
    """Return the targets at ``paths``, in the same order. Raises `TargetError` with all paths that do not exist."""
    missing = [path for path in paths if not path or path not in scanned.by_path]
    if missing:
        # The search for the closest names is slow, and a model of another architecture lacks every path.
        hints = [closest(path, scanned.by_path) for path in missing[:SEARCHED]]
        problems = [f"no module named {shown(path)}{hint}" for path, hint in zip_longest(missing, hints, fillvalue="")]
        raise TargetError("\n".join(first(problems)))
    return tuple([Target(path, scanned.by_path[path].module) for path in paths])


def tied(modules: Iterable[tuple[str, nn.Module]]) -> Mapping[int, tuple[str, ...]]:
    """Return all names of each tied parameter, by the parameter's id; ``modules`` are (path, module), each once."""
    names: dict[int, list[str]] = defaultdict(list)
    keys: dict[int, int] = {}
    for path, module in modules:
        for name, parameter in torch_private.parameters_of(module).items():
            key = keys[id(parameter)] = weights.identity(module, name, parameter)
            names[key].append(join(path, name))
    return {own: tuple(names[key]) for own, key in keys.items() if len(names[key]) > 1}
