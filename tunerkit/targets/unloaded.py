"""Which modules ``from_pretrained`` did not load, read from the marks that transformers sets."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import attrs
from torch import nn

from tunerkit.libraries import (
    PRETRAINED_MODEL,
    derives_from,
    is_built,
    is_computed,
    is_loaded,
    is_offloaded,
    named_heads,
    torch_private,
)
from tunerkit.paths import is_number, is_under, parent
from tunerkit.targets.scan import Scan, ScannedModule

_Owned = Sequence[tuple[ScannedModule, Sequence[nn.Parameter]]]  # modules, and their own parameters that may have marks


@attrs.frozen
class Unloaded:
    """The paths of modules with values that ``from_pretrained`` did not load, or may not have loaded.

    Attributes:
        whole: The outermost modules that are new as a whole.
        partly: The modules of whose own parameters some are new.
        heads: The heads that may be new, if the marks do not show it.
        replaced: The modules in blocks that are the reason: their parameters lost their marks.
    """

    whole: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


def find_unloaded(scanned: Scan) -> Unloaded:
    """Find the modules of a model that ``from_pretrained`` did not load."""
    owned = [(each, _own(each.module)) for each in (scanned.root, *scanned.modules)]
    marks = {each.path: [is_loaded(parameter) for parameter in own] for each, own in owned}
    if not any(map(any, marks.values())):
        return Unloaded(heads=_task_heads(scanned))
    if all(map(all, marks.values())):
        return Unloaded()
    if replaced := _replaced(scanned, owned):
        return Unloaded(heads=_task_heads(scanned), replaced=replaced)
    return _unmarked(scanned, marks)


def is_in_block(scanned: Scan, found: ScannedModule) -> bool:
    """Whether the module is in a numbered block; a head may number its layers too, most often in a Sequential."""
    if found.layer is None or found.in_head:
        return False
    above = itertools.takewhile(lambda part: not is_number(part), found.path.split("."))
    return not isinstance(scanned.by_path[".".join(above)].module, nn.Sequential)


def _replaced(scanned: Scan, owned: _Owned) -> tuple[str, ...]:
    """The modules in numbered blocks some of whose parameters lost their mark, so that marks prove nothing.

    What copies, moves or replaces a parameter drops its mark too. What ``from_pretrained`` did not find is different:
    it is in a module that ``from_pretrained`` built, and its first values were written in place, while loaded
    parameters were never written to.
    """
    new = [(each, [p for p in own if not is_loaded(p)]) for each, own in owned]
    unmarked = [(each, own) for each, own in new if own and is_in_block(scanned, each)]
    if not unmarked:
        return ()
    blocks = (own for each, own in owned if is_in_block(scanned, each))
    untouched = not any(torch_private.version(p) for own in blocks for p in own if is_loaded(p))
    return tuple(
        each.path
        for each, own in unmarked
        if not (untouched and is_built(each.module) and all(map(torch_private.version, own)))
    )


def _unmarked(scanned: Scan, marks: Mapping[str, list[bool]]) -> Unloaded:
    """What has no mark, where every mark is right."""
    known = [path for path, own in marks.items() if any(own) or _is_away(scanned.by_path[path].module)]
    mixed = {above for path in known for above in _upwards(path)}
    partly = tuple(path for path, own in marks.items() if path in mixed and not all(own))
    whole = [path for path, own in marks.items() if own and path not in mixed]
    outermost = {next(top for top in reversed([*_upwards(path)]) if top not in mixed) for path in whole}
    return Unloaded(whole=tuple(each.path for each in scanned.modules if each.path in outermost), partly=partly)


def _upwards(path: str) -> Iterator[str]:
    """The path, its parent, and so on up to the model itself."""
    yield path
    while path:
        path = parent(path)
        yield path


def _own(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of the module itself that may have a mark: offloading and packing replace parameters."""
    if _is_away(module) or is_computed(module):
        return []
    own = torch_private.own_parameters(module).values()
    return [p for p in own if type(p) is nn.Parameter and p.is_floating_point()]


def _is_away(module: nn.Module) -> bool:
    own = torch_private.own_parameters(module).values()
    return is_offloaded(module) or any(parameter is not None and parameter.is_meta for parameter in own)


def _task_heads(scanned: Scan) -> tuple[str, ...]:
    """The outermost heads of a transformers model, without output embeddings: those are in its checkpoint."""
    if not any(derives_from(each.module, PRETRAINED_MODEL) for each in (scanned.root, *scanned.modules)):
        return ()
    known = {id(head) for head in named_heads(scanned.root.module)}
    heads = [e for e in scanned.modules if e.in_head and next(e.module.parameters(), None) is not None]
    tasks = [e.path for e in heads if not any(id(part) in known for part in e.module.modules())]
    return tuple(path for path in tasks if not is_under(parent(path), tasks))
