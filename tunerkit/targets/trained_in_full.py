"""The modules and biases that are trained in full, as copies."""

from collections.abc import Iterator
from itertools import chain

from torch import nn

from tunerkit.errors import TargetError
from tunerkit.layers import bias_name, has_trainable_bias
from tunerkit.paths import is_under, join, parent
from tunerkit.records import Target
from tunerkit.targets.resolution import resolve_modules
from tunerkit.targets.scan import Scan


def choose_copies(scanned: Scan, names: tuple[str, ...]) -> tuple[str, ...]:
    """The modules trained in full as copies: those named, and in place of containers what they hold.

    A container runs whatever it holds, or is not run itself: a copy beside its children would be run as one of them.
    """
    chosen: list[str] = []
    for path in resolve_modules(scanned, names, what="train_modules"):
        found = scanned.by_path[path]
        if found.inside_attention or found.readers:
            raise TargetError(
                f"train_modules: {path!r} is read past its forward by its owner; name the owner {parent(path)!r}"
            )
        leaves = [leaf for leaf, module in _uncontained(path, found.module) if _has_tensors(module)]
        if not leaves:
            raise TargetError(f"train_modules: {path!r} holds nothing to train; leave it out")
        chosen += leaves
    return tuple(chosen)


def _uncontained(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        yield path, module
        return
    if next(module.parameters(recurse=False), None) is not None:
        name = type(module).__name__
        raise TargetError(f"train_modules: {path!r} is a {name} with parameters of its own; name the modules in it")
    for name, child in module.named_children():
        yield from _uncontained(join(path, name), child)


def _has_tensors(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def choose_biases(scanned: Scan, bias: str, chosen: tuple[Target, ...], copies: tuple[str, ...]) -> tuple[Target, ...]:
    """The modules whose bias is trained: none, the targets' own, or all of the model's."""
    if bias == "none":
        return ()
    if bias == "adapters":
        return tuple(t for t in chosen if has_trainable_bias(t.module, scanned.by_path[t.path].base))
    found, problems = [], []
    for each in (scanned.root, *scanned.modules):
        path, module, base = each.path, each.module, each.base
        own = {name: p for name, p in module.named_parameters(recurse=False, remove_duplicate=False) if "bias" in name}
        if not own or is_under(path, copies):
            continue
        full = join(path, bias_name(base))
        others = [name for name in scanned.sharers.get(id(own.get(bias_name(base))), ()) if name != full]
        known = not (each.inside_attention or each.read_and_called) and has_trainable_bias(module, base)
        if others:
            problems.append(f"{full} (tied to {', '.join(others)})")
        elif known and set(own) == {bias_name(base)}:
            found.append(Target(path=path, module=module))
        else:
            problems += [f"{join(path, name)} (of a {type(module).__name__})" for name in own]
    if problems:
        listed = ", ".join(problems)
        raise TargetError(
            f"bias='all' cannot train: {listed}; name their modules in train_modules or set bias='adapters'"
        )
    return tuple(found)
