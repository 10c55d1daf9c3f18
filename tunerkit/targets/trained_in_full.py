"""The modules and biases that are trained in full, as copies."""

from collections.abc import Iterator
from itertools import chain

from torch import nn

from tunerkit.errors import TargetError
from tunerkit.layers import BaseLayer, bias_name, describe, has_trainable_bias
from tunerkit.libraries import read_children
from tunerkit.paths import is_adapter_path, is_under, join, parent
from tunerkit.records import Target
from tunerkit.targets.resolution import resolve_modules
from tunerkit.targets.scan import survey, tied


def choose_copies(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """The modules trained in full as copies: those named, and in place of containers what they hold.

    A container runs whatever it holds, or is not run itself: a copy beside its children would be run as one of them.
    """
    found: list[str] = []
    for path in resolve_modules(model, names, what="train_modules"):
        owner = model.get_submodule(parent(path))
        if isinstance(owner, nn.MultiheadAttention) or path.rpartition(".")[2] in read_children(owner):
            raise TargetError(
                f"train_modules: {path!r} is read past its forward by its owner; name the owner {parent(path)!r}"
            )
        leaves = [leaf for leaf, module in _uncontained(path, model.get_submodule(path)) if _has_tensors(module)]
        if not leaves:
            raise TargetError(f"train_modules: {path!r} holds nothing to train; leave it out")
        found += leaves
    return tuple(found)


def _uncontained(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        yield path, module
        return
    if next(module.parameters(recurse=False), None) is not None:
        kind = type(module).__name__
        raise TargetError(f"train_modules: {path!r} is a {kind} with parameters of its own; name the modules in it")
    for name, child in module.named_children():
        yield from _uncontained(join(path, name), child)


def _has_tensors(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def choose_biases(
    model: nn.Module,
    bias: str,
    chosen: tuple[Target, ...],
    copies: tuple[str, ...],
    kinds: tuple[type[BaseLayer], ...],
) -> tuple[Target, ...]:
    """The modules whose bias is trained: none, the targets' own, or all of the model's."""
    if bias == "none":
        return ()
    if bias == "adapters":
        return tuple(t for t in chosen if has_trainable_bias(t.module, describe(t.module, kinds)))
    found, problems = [], []
    shared = tied(model)
    unknown = {id(p.module) for p in survey(model).places if p.inside_attention or p.read_and_called}
    modules = {path: module for path, module in model.named_modules() if not is_adapter_path(path + ".")}
    for path, module in modules.items():
        own = {name: p for name, p in module.named_parameters(recurse=False, remove_duplicate=False) if "bias" in name}
        if not own or is_under(path, copies):
            continue
        base = describe(module, kinds)
        full = join(path, bias_name(base))
        others = [name for name in shared.get(id(own.get(bias_name(base))), ()) if name != full]
        if others:
            problems.append(f"{full} (tied to {', '.join(others)})")
        elif set(own) == {bias_name(base)} and id(module) not in unknown and has_trainable_bias(module, base):
            found.append(Target(path=path, module=module))
        else:
            problems += [f"{join(path, name)} (of a {type(module).__name__})" for name in own]
    if problems:
        listed = ", ".join(problems)
        raise TargetError(
            f"bias='all' cannot train: {listed}; name their modules in train_modules or set bias='adapters'"
        )
    return tuple(found)
