"""Modules that no checkpoint filled, such as a new output head: they are trained as copies unless the user decides."""

import itertools
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from tunerkit.errors import PluginError, TargetError, TunerkitWarning
from tunerkit.layers import torch_private, whole_shape
from tunerkit.paths import CHILD, few, is_under, join
from tunerkit.patterns import is_broad, matcher
from tunerkit.records import NewModules
from tunerkit.targets.eligibility import refuse_tied
from tunerkit.targets.scan import Scan
from tunerkit.targets.trained_in_full import copies_at, holds_blocks, is_layer

_SHOWN = 5


def find_new(scanned: Scan) -> NewModules:
    """Find the modules that are new, as the first library says that knows any of the model."""
    heads = {each.path for each in scanned.modules if each.in_head}
    blocks = {each.path for each in scanned.modules if each.in_block}
    answers = (library.new(scanned.root.module, blocks, heads) for library in scanned.knowledge.libraries)
    found = next((answer for answer in answers if answer is not None), NewModules(loader=""))
    paths = {*found.whole, *found.partly, *found.heads, *found.replaced}
    if missing := sorted(paths - scanned.by_path.keys()):
        raise PluginError(f"a ModelLibrary finds new modules where the model has none: {few(missing, shown=_SHOWN)}")
    return found


def choose_new(
    scanned: Scan,
    new: NewModules,
    copies: tuple[str, ...],
    *,
    targets: str | Sequence[str] | None,
    exclude: Sequence[str],
    adapted: Collection[str] = (),
) -> tuple[str, ...]:
    """Choose the modules that are new, to train them in full, if ``train_modules`` is empty.

    One warning says what is trained, one what stays frozen although it is new, and one where that cannot be seen.
    Modules that ``exclude`` names are left alone, and so are those that alone match a plain name in ``targets``.

    Args:
        scanned: The scan of the model.
        new: What is new in it.
        copies: The modules that ``train_modules`` chose.
        targets: The config's patterns of targets.
        exclude: Its patterns of modules to leave alone.
        adapted: The paths of modules that active adapters have changed already.

    Returns:
        The paths of the copies, without those in ``copies``.
    """
    decided = {*copies, *adapted, *_named(scanned, targets, exclude, (*new.whole, *new.heads))}
    partly = [path or "the model itself" for path in new.partly if not _is_decided(path, decided)]
    trained, untrained = _copies(scanned, new.whole, decided)
    if copies:
        untrained += [f"train_modules does not name {path}" for path in trained]
        trained = {}
    _tell(scanned, new.loader, trained, [*(f"only a part of {path} is new" for path in partly), *untrained])
    decided.update(trained)
    unclear = (new.heads, new.replaced)
    _warn_of_unknown(new.loader, *([p for p in paths if not _is_decided(p, decided)] for paths in unclear))
    return tuple(itertools.chain(*trained.values()))


def trained_elsewhere(new: NewModules, copied: Collection[str]) -> tuple[str, ...]:
    """Find the modules whose values are new, or may be, among those that another adapter trains in full."""
    return tuple(path for path in copied if is_under(path, {*new.whole, *new.heads}))


def _copies(scanned: Scan, new: Sequence[str], decided: Collection[str]) -> tuple[dict[str, list[str]], list[str]]:
    """What is copied to train each of the modules in full, and why the rest cannot be trained."""
    trained: dict[str, list[str]] = defaultdict(list)
    untrained: list[str] = []
    for path in new:
        has_blocks = holds_blocks(scanned, path)
        for part in _layers(scanned, path) if has_blocks else [path]:
            if _is_decided(part, decided):
                continue
            try:
                if has_blocks and not is_layer(scanned.by_path[part].module):
                    raise TargetError(f"{part} holds parameters of its own beside its layers")
                own = copies_at(scanned, part)
                refuse_tied(scanned, own)
            except TargetError as error:
                untrained.append(str(error))
            else:
                trained[path] += own
    return dict(trained), untrained


def _layers(scanned: Scan, path: str) -> Iterator[str]:
    """The modules at and below ``path`` that hold parameters themselves; ``path`` holds blocks or is in one.

    A copy runs after its original. That is right for a layer, but attention would add its keys to the cache twice.
    """
    module = scanned.by_path[path].module
    if any(parameter is not None for parameter in torch_private.own_parameters(module).values()):
        yield path
    if not is_layer(module):
        for name, child in torch_private.own_children(module).items():
            if child is not None and name != CHILD:
                yield from _layers(scanned, join(path, name))


def _named(
    scanned: Scan, targets: str | Sequence[str] | None, exclude: Sequence[str], new: Collection[str]
) -> Iterator[str]:
    """The paths that ``exclude`` matches, and those that a plain name in ``targets`` does.

    A name that base layers have too, such as that of the projections in every block, says nothing about new ones.
    """
    for pattern in exclude:
        yield from filter(matcher(pattern), scanned.by_path)
    for name in (targets,) if isinstance(targets, str) else targets or ():
        hits = [] if is_broad(name) else list(filter(matcher(name), scanned.by_path))
        if all(_is_decided(path, new) for path in hits):
            yield from hits


def _is_decided(path: str, decided: Collection[str]) -> bool:
    """Whether the module at ``path`` is at, inside or around one of the modules that the user decided about."""
    return is_under(path, decided) or any(is_under(other, (path,)) for other in decided if path)


def _warn_of_unknown(loader: str, heads: Sequence[str], replaced: Sequence[str]) -> None:
    """Warn that the marks do not show whether ``heads`` are new; in the blocks, those of ``replaced`` are missing."""
    if not heads and not replaced:
        return
    lost = f" (in the blocks, the marks of {few(replaced, shown=_SHOWN)} are missing)" if replaced else ""
    advice = f"train_modules={list(heads[:_SHOWN])}. Otherwise name it in exclude"
    if not heads:
        advice = f"train_modules, or wrap the model as {loader} returns it. Otherwise ignore this"
    warnings.warn(
        f"it cannot be seen whether {few(heads or replaced, shown=_SHOWN)} is new: the model was built from a config, "
        f"copied or moved after {loader}{lost if heads else ''}. It stays frozen, and if it is new, the saved "
        f"adapter fits no other base: then set {advice}",
        TunerkitWarning,
        stacklevel=5,
    )


def _tell(scanned: Scan, loader: str, trained: Mapping[str, Sequence[str]], frozen: Sequence[str]) -> None:
    """Warn about what is new, in one line each; ``trained`` maps each module to its copies."""
    if trained:
        modules = {path: [scanned.by_path[copy].module for copy in copies] for path, copies in trained.items()}
        sizes = {
            path: sum(whole_shape(p).numel() for m in own for p in m.parameters()) for path, own in modules.items()
        }
        listed = few([f"{path} ({size:,} parameters)" for path, size in sizes.items()], shown=_SHOWN)
        listed += f", {sum(sizes.values()):,} parameters in all" if len(sizes) > 1 else ""
        warnings.warn(
            f"trained in full, as copies, because {loader} did not load their values: {listed}. To freeze one, "
            "name it in exclude, and save the base too, which alone has these values. To choose, set train_modules",
            TunerkitWarning,
            stacklevel=5,
        )
    if frozen:
        warnings.warn(
            f"some values were not loaded by {loader} and stay frozen: {few(frozen, shown=_SHOWN)}. The saved "
            "adapter fits only a base with the same values: save the base before you wrap it, and load adapters onto "
            "that. To silence this, name the modules in exclude",
            TunerkitWarning,
            stacklevel=5,
        )
