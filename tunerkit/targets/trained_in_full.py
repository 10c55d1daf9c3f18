"""The modules and biases that are trained in full, as copies."""

import warnings
from collections.abc import Iterable, Iterator
from itertools import chain

from torch import nn

from tunerkit.errors import TargetError, TunerkitWarning
from tunerkit.layers import bias_name, has_trainable_bias
from tunerkit.libraries import quantiser_of, torch_private
from tunerkit.paths import CHILD, few, is_under, join, parent
from tunerkit.records import Target
from tunerkit.targets.resolution import resolve_modules
from tunerkit.targets.scan import Scan, ScannedModule
from tunerkit.targets.unloaded import is_in_block


def choose_copies(scanned: Scan, names: tuple[str, ...]) -> tuple[str, ...]:
    """Find the modules that are trained in full, as copies.

    A container is replaced by the modules in it: it either runs all its children, so it would run a copy as one of
    them, or it is never run itself. Blocks, and what is in them, are replaced by their layers: a copy runs after its
    original, so attention would add its keys to the cache twice.

    Args:
        scanned: The scan of the model.
        names: The patterns of ``train_modules``.

    Returns:
        The paths of the modules.

    Raises:
        TargetError: A pattern matches nothing, or a module it matches cannot be trained as a copy.
    """
    chosen: list[str] = []
    whole: list[str] = []
    for path in resolve_modules(scanned, names, what="train_modules"):
        for part in _parts(scanned, path) if holds_blocks(scanned, path) else [path]:
            chosen += copies_at(scanned, part)
            if part != path or holds_blocks(scanned, path):
                whole += [own for own in copies_at(scanned, part) if not is_layer(scanned.by_path[own].module)]
    if whole:
        warnings.warn(
            f"trained in full as a whole, because they hold parameters beside their layers: {few(whole, shown=5)}. A "
            "copy runs after its original, so one that keeps a cache would fill it twice: train with use_cache=False, "
            "and merge before you generate",
            TunerkitWarning,
            stacklevel=4,
        )
    return tuple(chosen)


def holds_blocks(scanned: Scan, path: str) -> bool:
    """Whether the module at ``path`` is in a numbered block, or has one inside."""
    inside = (each for each in scanned.modules if f"{each.path}.".startswith(f"{path}."))
    return any(is_in_block(scanned, each) for each in inside)


def is_layer(module: nn.Module) -> bool:
    """Whether no module in it holds parameters, or it calls those in torch's own way."""
    inside = (child for name, child in torch_private.own_children(module).items() if child and name != CHILD)
    return isinstance(module, nn.MultiheadAttention) or all(next(m.parameters(), None) is None for m in inside)


def _parts(scanned: Scan, path: str) -> Iterator[str]:
    """The outermost modules at and below ``path`` that hold parameters themselves, or are layers."""
    module = scanned.by_path[path].module
    if is_layer(module) or any(p is not None for p in torch_private.own_parameters(module).values()):
        if _has_tensors(module):
            yield path
        return
    for name, child in torch_private.own_children(module).items():
        if child is not None and name != CHILD:
            yield from _parts(scanned, join(path, name))


def copies_at(scanned: Scan, path: str) -> list[str]:
    """Find what is copied to train the module at ``path`` in full: itself, or the modules in a container.

    Args:
        scanned: The scan of the model.
        path: The module's path.

    Returns:
        The paths of the copies.

    Raises:
        TargetError: The module cannot be trained as a copy.
    """
    found = scanned.by_path[path]
    if found.inside_attention or found.reading_owner is not None:
        held = ((parent(own), scanned.by_path[parent(own)].module) for own in found.paths)
        using = (own for own, by in held if by is found.reading_owner or isinstance(by, nn.MultiheadAttention))
        raise TargetError(
            f"train_modules: {path!r} is used directly, bypassing its forward(); name the owner {next(using)!r}"
        )
    leaves = [leaf for leaf, module in _uncontained(path, found.module) if _has_tensors(module)]
    if not leaves:
        raise TargetError(f"train_modules: {path!r} holds nothing to train; leave it out")
    packed = [part for part in found.module.modules() if quantiser_of(part) is not None or _is_packed(scanned, part)]
    if packed:
        raise TargetError(
            f"train_modules: {path!r} is or holds a quantised {type(packed[0]).__name__}, whose integers cannot be "
            "trained; adapt it instead (targets), or keep it out of the quantisation"
        )
    return leaves


def _is_packed(scanned: Scan, module: nn.Module) -> bool:
    bases = (each.base for each in scanned.modules if each.module is module)
    return any(base is not None and base.packing is not None for base in bases)


def _uncontained(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        yield path, module
        return
    if any(parameter is not None for parameter in torch_private.own_parameters(module).values()):
        name = type(module).__name__
        raise TargetError(f"train_modules: {path!r} is a {name} with parameters of its own; name the modules in it")
    for name, child in module.named_children():
        yield from _uncontained(join(path, name), child)


def _has_tensors(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def choose_biases(scanned: Scan, bias: str, chosen: tuple[Target, ...], copies: tuple[str, ...]) -> tuple[Target, ...]:
    """Find the modules whose bias is trained.

    Args:
        scanned: The scan of the model.
        bias: ``"none"``, ``"adapters"`` for those of the targets that have one, or ``"all"`` for the whole model's.
        chosen: The targets.
        copies: The paths of modules trained in full. They already train their biases.

    Returns:
        The modules.

    Raises:
        TargetError: Biases of the model cannot be trained; the error lists all of them.
    """
    if bias == "none":
        return ()
    places = {target.path for target in chosen}
    everywhere = [each for each in (scanned.root, *scanned.modules) if not is_under(each.path, copies)]
    _warn_of_fixed(each for each in everywhere if bias == "all" or each.path in places)
    if bias == "adapters":
        return tuple(t for t in chosen if has_trainable_bias(t.module, scanned.by_path[t.path].base))
    found, problems = [], []
    for each in everywhere:
        named = torch_private.own_parameters(each.module).items()
        own = {name: p for name, p in named if p is not None and "bias" in name}
        if not own:
            continue
        name = bias_name(each.base)
        full = join(each.path, name)
        others = [other for other in scanned.sharers.get(id(own.get(name)), ()) if other != full]
        if others:
            problems.append(f"{full} (tied to {', '.join(others)})")
        elif takes_bias(each) and set(own) == {name}:
            found.append(Target(each.path, each.module))
        else:
            problems += [f"{join(each.path, other)} (of a {type(each.module).__name__})" for other in own]
    if problems:
        way_out = "name their modules in train_modules or set bias='adapters'"
        raise TargetError(f"bias='all' cannot train: {', '.join(problems)}; {way_out}")
    return tuple(found)


def _warn_of_fixed(found: Iterable[ScannedModule]) -> None:
    """Warn of biases that a quantised layer holds in another way than as a parameter."""
    packed = ((each, each.base) for each in found if each.base is not None and each.base.packing is not None)
    fixed = [
        each.path
        for each, base in packed
        if torch_private.own_parameters(each.module).get(base.bias_name) is None and base.bias() is not None
    ]
    if fixed:
        warnings.warn(
            f"the biases of {len(fixed)} quantised layers are not trained, since their library does not hold them as "
            f"parameters: {few(fixed, shown=5)}",
            TunerkitWarning,
            stacklevel=5,
        )


def takes_bias(each: ScannedModule) -> bool:
    """Whether core knows where the module adds its bias, so that a trained copy can replace it."""
    return not (each.inside_attention or each.read_and_called) and has_trainable_bias(each.module, each.base)
