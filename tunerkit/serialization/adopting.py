"""Adopt an adapter of another program: find its modules in the model, and convert it to an installed method."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import hooks, patterns, targets
from tunerkit.config import unstructure
from tunerkit.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigError,
    FileError,
    PluginError,
    TargetError,
    UnknownMethodError,
    first,
    shown,
    warn,
)
from tunerkit.extras import install
from tunerkit.injection import Progress, Tuner
from tunerkit.layers import Adapter, BaseLayer, bias_name, misfit, torch_private, weights
from tunerkit.paths import CHILD, few, is_under, join
from tunerkit.records import Factors, Foreign, Format, Target, conform
from tunerkit.serialization.fingerprint import refuse_places
from tunerkit.serialization.tensor_checks import refuse_nonfinite
from tunerkit.targets import Scan

# The method to which every low-rank adapter can be converted.
_COMMON = "lora"


def adopt(
    format: Format, path: str | os.PathLike[str], scanned: Scan, adapter: str
) -> tuple[Tuner, dict[str, Tensor], Mapping[str, Adapter] | None]:
    """Read an adapter of another program and convert it to an installed method, without changing the model.

    Return the tuner, its tensors by their names in a tunerkit file, and the adapters by target path if they were built
    from low-rank factors, else None. One warning lists whatever the conversion loses.
    """
    source, model = os.fspath(path), scanned.root.module
    found = _read(format, Path(path), model)
    places = found.factors or found.tensors
    if not places:
        raise FileError(f"{source} holds no adapter: it has no targets, so there is nothing to load")
    other_base = f"{source} was made for another base model{f', {shown(found.base)}' if found.base else ''}"
    try:
        targets.from_paths(scanned, [*places, *found.copies, *found.biases])
    except TargetError as error:
        raise BaseMismatchError(f"{other_base}: {error}") from error
    tensors, copies = _in_full(found, scanned)
    _refuse_biases(found, scanned, source)
    method, remarks = _method_of(found, source)
    chosen = _targets_of(places, scanned, source)
    refuse_places(scanned, chosen, copies, source, method=hooks.registry.get(method))
    bases = {target.path: base for target in chosen if (base := scanned.by_path[target.path].base) is not None}
    products = _products(found, format, bases, other_base) if found.factors else {}
    factors = {f"{at} ({name})": each for at, own in products.items() for name, each in own._asdict().items()}
    refuse_nonfinite(factors, {}, source)
    ready: Mapping[str, Adapter] | None = None
    settings, own = found.config, found.tensors
    if method != found.method or not own:
        with torch.random.fork_rng(devices=[]):  # keep the caller's random state
            config, ready = hooks.from_factors(method, chosen, products)
        settings, own = unstructure(config), {at: made.state_dict() for at, made in ready.items()}
    tensors |= {join(at, f"adapter.{name}"): tensor for at, each in own.items() for name, tensor in each.items()}
    if method == found.method:
        tensors |= {join(chosen[0].path, join(CHILD, name)): tensor for name, tensor in found.shared.items()}
    at_targets = set(found.biases) <= set(places)
    where = {
        "targets": tuple(patterns.exact_patterns([target.path for target in chosen]).values()),
        "exclude": (),
        "train_modules": tuple(patterns.exact_patterns(copies).values()),
        "bias": "none" if not found.biases else "adapters" if at_targets else "all",
    }
    try:
        config = hooks.structure(method, {**settings, **where})
    except ConfigError as error:
        raise FileError(f"{source} has settings that method {method!r} rejects:\n{error}") from error
    if remarks:
        warn("\n- ".join([f"{source}:", *remarks]))
    tuner = Tuner(
        name=adapter,
        method=method,
        config=config,
        model=model,
        targets=chosen,
        copies=targets.from_paths(scanned, copies),
        biases=targets.from_paths(scanned, [*found.biases]),
        progress=Progress(loaded=True),
    )
    return tuner, tensors, ready


def _read(format: Format, path: Path, model: nn.Module) -> Foreign:
    """Return the adapter that the format's plugin reads at ``path``, after a check of the plugin's answer."""
    if (holder := weights.emptied(model.parameters())) is not None:
        raise AdapterError(
            f"{path} is in format {format.name!r}, whose reader needs the base's full weights, but {holder.name} has "
            "partitioned them: load the adapter onto an unpartitioned base in one process, tunerkit.save it there, "
            "and load that file here"
        )
    with hooks.naming(format, "read"):
        found: Foreign = conform(format.read(path, model), Foreign)
    if found.tensors and found.factors and found.tensors.keys() != set(found.factors):
        raise PluginError(f"read of format {format.name!r}: tensors must have the same paths as factors, or be empty")
    return found


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim in (2, 3) and value.is_floating_point()


def _in_full(found: Foreign, scanned: Scan) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of copies and biases by name, and the paths of copies, with containers split into modules."""
    tensors = {join(path, "bias"): bias for path, bias in found.biases.items()}
    copies: list[str] = []
    for path, own in found.copies.items():
        parts = targets.copies_at(scanned, path)
        copies += parts
        for name, tensor in own.items():
            part = max((each for each in parts if is_under(join(path, name), (each,))), key=len, default=path)
            tensors[join(part, f"copy.{join(path, name).removeprefix(part + '.')}")] = tensor
    return tensors, copies


def _targets_of(paths: Collection[str], scanned: Scan, source: str) -> tuple[Target, ...]:
    """Return the targets at ``paths`` in the model's order. Raises `TargetError` for a module with several paths."""
    for path in paths:
        if others := [repr(each) for each in scanned.by_path[path].paths if each != path]:
            raise TargetError(
                f"{source} adapts {path!r}, which is the same module as {' and '.join(others)}: tunerkit would adapt "
                "it at all of these paths, other programs only at the paths in their files. Give each path a module "
                "of its own (copy.deepcopy)"
            )
    return targets.from_paths(scanned, [each.path for each in scanned.modules if each.path in paths])


def _refuse_biases(found: Foreign, scanned: Scan, source: str) -> None:
    """Raise an error for biases that the model lacks, or that cannot be trained apart from their module."""
    places = {path: scanned.by_path[path] for path in found.biases}
    own = {path: torch_private.own_parameters(each.module) for path, each in places.items()}
    lacking = [path for path, each in places.items() if own[path].get(bias_name(each.base)) is None]
    if lacking:
        raise BaseMismatchError(
            f"{source} was made for another base model: it trains biases of {few(lacking, shown=5)}, which have no "
            "bias here"
        )
    wrong = [
        f"{path} (a {type(each.module).__name__})" for path, each in places.items() if not targets.takes_bias(each)
    ]
    others = {path: [other for other in each.paths if other != path] for path, each in places.items()}
    shared = [f"{path} (the same module as {' and '.join(paths)})" for path, paths in others.items() if paths]
    if wrong or shared:
        raise TargetError(
            f"{source} trains biases that tunerkit cannot train apart from their module: "
            f"{few(wrong or shared, shown=5)}. Merge the adapter in the program that trained it, and use the merged "
            "model as the base"
        )


def _products(found: Foreign, format: Format, bases: Mapping[str, BaseLayer], other_base: str) -> dict[str, Factors]:
    """Return the low-rank factors of each target. Raises `BaseMismatchError` if they do not fit the base's weight."""
    with hooks.naming(format, "read"):
        products: dict[str, Any] = {at: found.factors[at] for at in bases}  # Any: the plugin may return anything
    problems = []
    for at, product in products.items():
        if not isinstance(product, Factors) or not all(map(_is_matrix, product)):
            raise PluginError(f"read of format {format.name!r} returned {shown(product)} for {at!r}; expected Factors")
        if (shapes := misfit(bases[at], product)) is not None:
            problems.append(f"{at} has {shapes[0]}; this model needs {shapes[1]}")
    if problems:
        raise BaseMismatchError("\n- ".join([f"{other_base}; shapes differ:", *first(problems)]))
    return products


def _method_of(found: Foreign, source: str) -> tuple[str, tuple[str, ...]]:
    """Return the installed method to which the adapter is converted, and remarks for the warning."""
    listed = hooks.registry.methods()
    wanted = list(dict.fromkeys((found.method, _COMMON))) if found.factors else [found.method]
    usable = [name for name in wanted if name in listed and listed[name].error is None]
    if not usable:
        broken = [f"\n{name} is installed and broken: {listed[name].error}" for name in wanted if name in listed]
        raise UnknownMethodError(
            f"{source} holds a {found.method} adapter, and no installed method can load it. It needs "
            f"{' or '.join(wanted)}: {install(wanted[-1])}{''.join(broken)}"
        )
    if usable[0] == found.method:
        return found.method, tuple(found.remarks)
    return _COMMON, (
        *found.remarks,
        f"method {found.method!r} is not installed (tunerkit-{found.method}), so it becomes {_COMMON} with its current "
        "rank at each target: the model's output is the same, but further training does not change the ranks",
    )
