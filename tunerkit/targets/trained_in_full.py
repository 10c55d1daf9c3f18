"""The modules and biases that are trained in full, as copies."""

from collections.abc import Iterator, Sequence
from itertools import chain

from torch import nn

from tunerkit.errors import TargetError, warn
from tunerkit.layers import bias_name, has_trainable_bias, torch_private
from tunerkit.paths import CHILD, few, is_under, join, parent
from tunerkit.patterns import matcher
from tunerkit.records import Target
from tunerkit.targets.eligibility import quantiser_of, refuse
from tunerkit.targets.scan import Scan, ScannedModule
from tunerkit.targets.selection import matching, unknown


def choose_copies(scanned: Scan, names: tuple[str, ...]) -> tuple[str, ...]:
    """Find the modules that are trained in full, as copies; ``names`` are the patterns of ``train_modules``.

    A container is replaced by the modules in it: it either runs all its children, so it would run a copy as one of
    them, or it is never run itself. Blocks, and what is in them, are replaced by their layers: a copy runs after its
    original, so attention would add its keys to the cache twice.

    Returns:
        The paths of the modules.

    Raises:
        TargetError: A pattern matches nothing, or a module it matches cannot be trained as a copy.
    """
    chosen: list[str] = []
    whole: list[str] = []
    for path in resolve_modules(scanned, names):
        has_blocks = holds_blocks(scanned, path)
        for part in _parts(scanned, path) if has_blocks else [path]:
            own = copies_at(scanned, part)
            chosen += own
            whole += [each for each in own if has_blocks and not is_layer(scanned.by_path[each].module)]
    if whole:
        warn(
            f"trained in full as a whole, because they hold parameters beside their layers: {few(whole, shown=5)}. A "
            "copy runs after its original, so one that keeps a cache would fill it twice: train with use_cache=False, "
            "and merge before you generate"
        )
    return tuple(chosen)


def resolve_modules(scanned: Scan, names: Sequence[str]) -> tuple[str, ...]:
    """Find the modules that patterns match, in the model's order; of nested modules only the outermost.

    Raises `TargetError` listing all patterns that match nothing.
    """
    matched = {name: matching(scanned.modules, matcher(name)) for name in names}
    idle = [name for name, modules in matched.items() if not modules]
    refuse(f"train_modules: {unknown(name, scanned, scanned.modules, told=told)}" for told, name in enumerate(idle))
    found = {module.path for modules in matched.values() for module in modules}
    paths = (module.path for module in scanned.modules if module.path in found)
    return tuple(path for path in paths if not is_under(parent(path), found))


def holds_blocks(scanned: Scan, path: str) -> bool:
    """Whether the module at ``path`` is in a numbered block, or has one inside."""
    return any(each.in_block for each in scanned.modules if f"{each.path}.".startswith(f"{path}."))


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
    """Find the paths of what is copied to train the module at ``path`` in full: itself, or the modules in a container.

    Raises `TargetError` if it cannot be trained as a copy.
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
    known = {id(each.module) for each in scanned.modules if each.base is not None and each.base.packing is not None}
    packed = [part for part in found.module.modules() if quantiser_of(part) is not None or id(part) in known]
    if packed:
        raise TargetError(
            f"train_modules: {path!r} is or holds a quantised {type(packed[0]).__name__}, whose integers cannot be "
            "trained; adapt it instead (targets), or keep it out of the quantisation"
        )
    return leaves


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
    """Find the modules whose bias is trained: of the targets (``"adapters"``), or of the whole model (``"all"``).

    Those at the paths ``copies`` are trained in full, with their biases. Raises `TargetError` listing all biases of the
    model that cannot be trained.
    """
    if bias == "none":
        return ()
    places = {target.path for target in chosen}
    everywhere = [each for each in (scanned.root, *scanned.modules) if not is_under(each.path, copies)]
    own = {each.path: torch_private.own_parameters(each.module) for each in everywhere}
    fixed = [
        path
        for path, base in ((each.path, each.base) for each in everywhere if bias == "all" or each.path in places)
        if base is not None and base.packing is not None and own[path].get(base.bias_name) is None
        if base.bias() is not None
    ]
    if fixed:
        warn(
            f"the biases of {len(fixed)} quantised layers are not trained, since their library does not hold them as "
            f"parameters: {few(fixed, shown=5)}"
        )
    if bias == "adapters":
        return tuple(t for t in chosen if has_trainable_bias(t.module, scanned.by_path[t.path].base))
    found, problems = [], []
    for each in everywhere:
        biases = {name: p for name, p in own[each.path].items() if p is not None and "bias" in name}
        if not biases:
            continue
        name = bias_name(each.base)
        full = join(each.path, name)
        others = [other for other in scanned.sharers.get(id(biases.get(name)), ()) if other != full]
        if others:
            problems.append(f"{full} (tied to {', '.join(others)})")
        elif takes_bias(each) and set(biases) == {name}:
            found.append(Target(each.path, each.module))
        else:
            problems += [f"{join(each.path, other)} (of a {type(each.module).__name__})" for other in biases]
    if problems:
        way_out = "name their modules in train_modules or set bias='adapters'"
        raise TargetError(f"bias='all' cannot train: {', '.join(problems)}; {way_out}")
    return tuple(found)


def takes_bias(each: ScannedModule) -> bool:
    """Whether core knows where the module adds its bias, so that a trained copy can replace it."""
    return not (each.inside_attention or each.read_and_called) and has_trainable_bias(each.module, each.base)
