"""Modules that no checkpoint filled, such as a new output head: they are trained as copies unless the user decides."""

import itertools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from tunerkit.config import AdapterConfig
from tunerkit.errors import TargetError, TunerkitWarning
from tunerkit.libraries import (
    PRETRAINED_MODEL,
    derives_from,
    grown_embeddings,
    is_computed,
    is_loaded,
    is_offloaded,
    named_heads,
    torch_private,
)
from tunerkit.paths import few, is_number, is_under, parent
from tunerkit.patterns import is_broad, matcher
from tunerkit.targets.resolution import refuse_tied
from tunerkit.targets.scan import Scan, ScannedModule
from tunerkit.targets.trained_in_full import copies_at

_SHOWN = 5


def add_new(
    scanned: Scan, copies: tuple[str, ...], config: AdapterConfig, adapted: Collection[str] = ()
) -> tuple[str, ...]:
    """Add the modules that are new to those that are trained in full, if ``train_modules`` is empty.

    New are output heads and other modules that ``from_pretrained`` did not find in the checkpoint, and the embeddings
    to which tokens were added. One warning says what is trained, and one what stays frozen although it is new. Modules
    that the config names in ``exclude`` or ``targets`` are left alone.

    Args:
        scanned: The scan of the model.
        copies: The modules that ``train_modules`` chose.
        config: The method's config.
        adapted: The paths of modules that active adapters have changed already.

    Returns:
        The paths of the copies.
    """
    decided = {*copies, *adapted, *_named(scanned, config)}
    marks = _marks(scanned)
    whole, partly = _unmarked(scanned, marks) if marks else ([], [])
    new = [path for path in dict.fromkeys((*whole, *_longer(scanned))) if not _is_decided(path, decided)]
    parts = [path or "the model itself" for path in partly if not _is_decided(path, decided)]
    frozen = [f"only a part of {path} is new" for path in parts]
    trained: list[str] = []
    for path in new:
        try:
            own = copies_at(scanned, path)
            refuse_tied(scanned, own)
        except TargetError as error:
            frozen.append(str(error))
        else:
            trained += own
    if copies:
        frozen += [f"train_modules does not name {path}" for path in trained]
        trained = []
    _tell(scanned, trained, frozen)
    if marks is None:
        _warn_of_unknown([path for path in _task_heads(scanned) if not _is_decided(path, {*decided, *trained})])
    return (*copies, *trained)


def _named(scanned: Scan, config: AdapterConfig) -> Iterator[str]:
    """The paths that ``exclude`` matches, and those that a plain name in ``targets`` does."""
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets or ()
    for pattern in (*config.exclude, *(name for name in targets if not is_broad(name))):
        yield from filter(matcher(pattern), scanned.by_path)


def _is_decided(path: str, decided: Collection[str]) -> bool:
    """Whether the module at ``path`` is at, inside or around one of the modules that the user decided about."""
    return is_under(path, decided) or any(is_under(other, (path,)) for other in decided if path)


def _longer(scanned: Scan) -> list[str]:
    """The embeddings to which tokens were added, and the output embeddings of the same length."""
    grown = grown_embeddings(scanned.root.module)
    rows = {embedding.num_embeddings for embedding in grown}
    heads = [head for head in named_heads(scanned.root.module) if _rows(head) in rows]
    longer = {id(module) for module in (*grown, *heads)}
    return [each.path for each in scanned.modules if id(each.module) in longer]


def _rows(head: nn.Module) -> int | None:
    weight = torch_private.own_parameters(head).get("weight")
    return None if weight is None else weight.shape[0]


def _marks(scanned: Scan) -> dict[str, list[bool]] | None:
    """For each module whether each of its own parameters was loaded; None if the marks tell nothing.

    They tell nothing where no parameter has one, or where one in a numbered block has none: what copies, moves or
    replaces parameters also drops their marks.
    """
    marks = {each.path: [is_loaded(p) for p in _own(each.module)] for each in (scanned.root, *scanned.modules)}
    dropped = any(not all(marks[each.path]) for each in scanned.modules if _is_in_block(scanned, each))
    return marks if any(map(any, marks.values())) and not dropped else None


def _is_in_block(scanned: Scan, found: ScannedModule) -> bool:
    """Whether the module is in a numbered block; a head may number its layers too, most often in a Sequential."""
    if found.layer is None or found.in_head:
        return False
    above = itertools.takewhile(lambda part: not is_number(part), found.path.split("."))
    return not isinstance(scanned.by_path[".".join(above)].module, nn.Sequential)


def _unmarked(scanned: Scan, marks: Mapping[str, list[bool]]) -> tuple[list[str], list[str]]:
    """The outermost modules that are new as a whole, and those of whose own parameters some are new."""
    known = [path for path, own in marks.items() if any(own) or _is_away(scanned.by_path[path].module)]
    mixed = {above for path in known for above in _upwards(path)}
    partly = [path for path, own in marks.items() if path in mixed and not all(own)]
    whole = [path for path, own in marks.items() if own and path not in mixed]
    outermost = {next(top for top in reversed([*_upwards(path)]) if top not in mixed) for path in whole}
    return [each.path for each in scanned.modules if each.path in outermost], partly


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


def _task_heads(scanned: Scan) -> list[str]:
    """The outermost heads of a transformers model, without output embeddings: those are in its checkpoint."""
    if not any(derives_from(each.module, PRETRAINED_MODEL) for each in (scanned.root, *scanned.modules)):
        return []
    known = {id(head) for head in named_heads(scanned.root.module)}
    heads = [e for e in scanned.modules if e.in_head and next(e.module.parameters(), None) is not None]
    tasks = [e.path for e in heads if not any(id(part) in known for part in e.module.modules())]
    return [path for path in tasks if not is_under(parent(path), tasks)]


def _warn_of_unknown(heads: Sequence[str]) -> None:
    if heads:
        warnings.warn(
            f"it cannot be seen whether {few(heads, shown=_SHOWN)} is new: the model was built from a config, copied "
            "or moved after from_pretrained. It stays frozen, and if it is new, the saved adapter fits no other base: "
            f"then set train_modules={list(heads[:_SHOWN])}. Otherwise name it in exclude",
            TunerkitWarning,
            stacklevel=4,
        )


def _tell(scanned: Scan, trained: Sequence[str], frozen: Sequence[str]) -> None:
    """Warn about what is new, in one line each."""
    if trained:
        sizes = {path: sum(p.numel() for p in scanned.by_path[path].module.parameters()) for path in trained}
        listed = few([f"{path} ({size:,} parameters)" for path, size in sizes.items()], shown=_SHOWN)
        warnings.warn(
            f"trained in full, as copies, because from_pretrained did not load their values: {listed}. To freeze one, "
            "name it in exclude, and save the base too, which alone has these values. To choose, set train_modules",
            TunerkitWarning,
            stacklevel=4,
        )
    if frozen:
        warnings.warn(
            f"some values were not loaded by from_pretrained and stay frozen: {few(frozen, shown=_SHOWN)}. The saved "
            "adapter fits only a base with the same values: save the base before you wrap it, and load adapters onto "
            "that. To silence this, name the modules in exclude",
            TunerkitWarning,
            stacklevel=4,
        )
