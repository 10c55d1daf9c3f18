"""Reasons why a module cannot be adapted or trained in full: its kind, its owner's use of the weight, tied weights."""

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product

import torch
from torch import nn

from tunerkit.errors import PluginError, TargetError, warn
from tunerkit.extras import QUANTISED, distribution, install, quantiser
from tunerkit.layers import NormLayer, forward_owner, is_packed, torch_private, weights, whole_shape
from tunerkit.paths import is_number, is_under, join, parent
from tunerkit.records import Method, Target
from tunerkit.targets.scan import Scan, ScannedModule

_ATTENTION = "nn.MultiheadAttention with its own forward may use its weights in other ways, so it cannot be adapted"
_SEPARATE = "nn.MultiheadAttention with kdim or vdim has three weights instead of one, which cannot be adapted yet"
_NOT_CALLED = "is used directly by its owner, bypassing its forward(), so it has no output to adapt"
_READ_AND_CALLED = "is a child of several modules, one of which bypasses its forward(), where an adapter has no effect"
_NO_NORM = "is not a norm over the last dimension with its own weight, and the method adapts only such norms"
_READ_AND_OFFLOADED = "is offloaded, and its weight is used directly, bypassing its forward(): it cannot be overridden"
_is_meta = operator.attrgetter("is_meta")


def obstacle_at(found: ScannedModule, scanned: Scan, others: Collection[str], *, method: Method) -> str | None:
    """Return why a module cannot be adapted together with ``others`` (a fragment that follows its path), or None."""
    module, base = found.module, found.base
    if base is not None and base.stack and not method.stacks:
        return f"is a stack of {base.stack} matrices, which method {method.name!r} does not adapt"
    if method.targets != "weights":
        return _output_obstacle(found) or (_NO_NORM if method.targets == "norms" and not is_norm(found) else None)
    attends = isinstance(module, nn.MultiheadAttention)
    if base is None and attends:
        return _SEPARATE if forward_owner(module) is nn.MultiheadAttention else _ATTENTION
    if found.inside_attention:
        return _ATTENTION
    if base is None:
        return _without_kind(module, scanned)
    if found.read_and_called:
        return _READ_AND_CALLED
    if (obstacle := base.obstacle()) is not None:
        return obstacle
    if (found.reading_owner is not None or attends) and weights.offloading(module):
        return _READ_AND_OFFLOADED
    own = torch_private.parameters_of(base.holder)
    usual = isinstance(module, nn.Linear | nn.Embedding) or torch_private.is_convolution(module)
    if usual and "weight" not in own:
        return "has a weight computed from others (a parametrization), which cannot be adapted yet"
    if not scanned.unloaded and any(map(_is_meta, own.values())) and not weights.offloading(module):
        return "has its weight on the meta device; load the weights first"
    if (weight := own.get(base.weight_name)) is not None and 0 in whole_shape(weight):
        return f"has an empty weight, of shape {tuple(whole_shape(weight))}, with nothing to adapt: exclude it"
    if any(map(torch.is_complex, own.values())):
        return "has complex weights, which cannot be adapted yet"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "has max_norm set, so its forward() rewrites its weight; build it without max_norm"
    for leaf, parameter in own.items():
        names = scanned.sharers.get(id(parameter))
        if names and left_out(names, {found.path, *others}):
            way = _way_out(scanned, join(found.path, leaf), names, setting="targets")
            shared = f"has a tied weight, shared as {', '.join(names)}"
            return f"{shared}: an adapter on one would not change the others. {way}"
    return None


def _without_kind(module: nn.Module, scanned: Scan) -> str:
    name, library, owner = type(module).__name__, quantiser_of(module), forward_owner(module)
    unserved = scanned.knowledge.unserved(module)
    if library is None:
        return f"is a {name}, which cannot be adapted{unserved and f': {unserved}'}"
    # torch's own forward is fine too, since a library may replace only the weight.
    if quantiser(owner) is None and not owner.__module__.startswith("torch.nn."):
        return (
            f"is a {name} that {library} has quantized, with its own forward, which may use the packed weight in other "
            "ways: remove that forward, or exclude the layer from the targets"
        )
    way_out = unserved or f"install {distribution(QUANTISED)}, or a version of it that does ({install(QUANTISED)})"
    return (
        f"is a {name} that {library} has quantized, and no installed base-layer kind supports it: {way_out}, or load "
        "the model without quantization"
    )


def warn_of_unknown_packed(scanned: Scan) -> None:
    """Warn of quantized layers that no installed kind supports, even if they are not targets."""
    found = [(each, name) for each in scanned.modules if each.base is None and (name := quantiser_of(each.module))]
    if found:
        first, library = found[0]
        unserved = scanned.knowledge.unserved(first.module)
        warn(
            f"{library} has quantized {len(found)} layers ({first.path}, ...) that no installed base-layer kind "
            "supports. Adapter files will describe the packed weights, so that the adapter fits only a base with the "
            f"same quantization{unserved and f': {unserved}'}"
        )


def quantiser_of(module: nn.Module) -> str | None:
    """Return the name of the library that quantized ``module``; None if there is none, or if it is unknown."""
    packed = (type(own) for own in torch_private.parameters_of(module).values() if is_packed(own))
    # Base classes too, since a forward on the instance or in a subclass hides the library's.
    owners = (forward_owner(module), *packed, *type(module).__mro__)
    return next((name for owner in owners if (name := quantiser(owner)) is not None), None)


def is_norm(found: ScannedModule) -> bool:
    """Whether the module is a norm that a method can adapt."""
    return found.base is None and NormLayer.matches(found.module)


def _output_obstacle(found: ScannedModule) -> str | None:
    if found.inside_attention or found.reader is not None:
        return _NOT_CALLED
    if isinstance(found.module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        return f"is a {type(found.module).__name__}, which is never called, so it has no output to adapt"
    if isinstance(found.module, nn.Sequential):
        return "is an nn.Sequential, which would run the adapter as a child; name its last layer instead"
    return None


def left_out(names: Sequence[str], sides: Collection[str]) -> list[str]:
    """Return a tied parameter's names outside ``sides``, the adapted or trained paths; empty if no name is inside.

    An alias is omitted: a parent's name for its layer's bias, as in BERT's masked head.
    """

    def is_alias(name: str) -> bool:
        owner = parent(name)
        around = (not owner or is_under(other, (owner,)) for other in inside)
        return "bias" in name.rpartition(".")[2] and any(around)

    inside = [name for name in names if is_under(name, sides)]
    return [name for name in names if inside and name not in inside and not is_alias(name)]


def _way_out(scanned: Scan, name: str, names: Sequence[str], *, setting: str) -> str:
    """Return advice on adapting the tied parameter ``name``; it ends with Python code that unties the parameter."""
    owners = list(dict.fromkeys(map(parent, names)))
    found = [scanned.by_path.get(owner) for owner in owners]
    nameable = all(each is not None and (setting != "targets" or each.base is not None) for each in found)
    listed = ", ".join(f'"{owner}"' for owner in owners)
    each_own = f"Name all modules by plain names, and each gets its own adapter or copy: {setting}=({listed}). "
    owner, leaf = parent(name), name.rpartition(".")[2]
    dotted = all(part.isidentifier() for part in owner.split("."))
    place = f"model.{owner}" if dotted else f'model.get_submodule("{owner}")'
    code = f"{place}.{leaf} = torch.nn.Parameter({place}.{leaf}.detach().clone())"
    flags = (flag for library in scanned.libraries for flag in library.tied_flags(scanned.root.module))
    code += "".join(f"; model.{flag} = False" for flag in flags)
    untying = f"{each_own}Or untie" if nameable and all(owners) else "Untie"
    return f"{untying} the model before you wrap it or load onto it: {code}"


# --- Errors that list every problem -----------------------------------------------------------------------------------


def refuse(problems: Iterable[str]) -> None:
    """Raise `TargetError` with one line per problem, if there are any."""
    if text := "\n".join(problems):
        raise TargetError(text)


def lines(reasons: Mapping[str, str | None]) -> list[str]:
    """Return one line for each path with a reason; paths that differ only in numbers share a line."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, reason in reasons.items():
        if reason is not None:
            shape = ".".join("*" if is_number(part) else part for part in path.split("."))
            alike[shape, reason].append(path)
    return [
        f"{first}{f' and {len(others)} more like it' if others else ''}: {reason}"
        for (_, reason), (first, *others) in alike.items()
    ]


def refuse_unfit(scanned: Scan, targets: Iterable[Target], *, method: Method) -> None:
    """Raise `TargetError` with every target that a method cannot adapt. Tied modules are allowed if all are targets."""
    found = {target.path: scanned.by_path[target.path] for target in targets}
    paths = {each.path for each in found.values()}
    refuse(lines({path: obstacle_at(each, scanned, paths, method=method) for path, each in found.items()}))


def refuse_tied(scanned: Scan, paths: Collection[str]) -> None:
    """Raise `TargetError` if a parameter under ``paths`` is tied to a parameter outside of them."""
    problems = []
    for path, names in product(paths, dict.fromkeys(scanned.sharers.values())):
        inside = [name for name in names if is_under(name, (path,))]
        if inside and left_out(names, paths):
            outside = ", ".join(name for name in names if name not in inside)
            way = _way_out(scanned, inside[0], names, setting="train_modules")
            problems.append(f"{path!r} cannot be trained in full: {inside[0]} is tied to {outside}. {way}")
    refuse(problems)


def refuse_impassable(scanned: Scan) -> None:
    """Raise `TargetError` that lists all packed layers, targets or not, through which gradients cannot flow."""
    bases = {each.path: each.base for each in (scanned.root, *scanned.modules) if each.base is not None}
    packed = {path: (base, base.packing) for path, base in bases.items() if base.packing is not None}
    refuse(lines({path or "the model": base.obstacle() for path, (base, _) in packed.items()}))
    for base, packing in packed.values():
        if isinstance(vars(torch).get(packing.name), torch.dtype):
            raise PluginError(
                f"the packing of {type(base).__name__} has the name {packing.name!r}, like a dtype of torch, so files "
                "would describe its weight as not packed. Its plugin must put the library's name first, as in "
                f"{f'mylib {packing.name}'!r}"
            )
