"""Adopt an adapter of another program: find its places in the model, and build it as one of an installed method."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tunerkit import hooks, injection, patterns, targets
from tunerkit.errors import (
    BaseMismatchError,
    ConfigError,
    FileError,
    TargetError,
    UnknownMethodError,
    first,
    shown,
    warn,
)
from tunerkit.injection import Progress, Slot, Tuner
from tunerkit.layers import Adapter, BaseLayer, bias_name, misfit, torch_private
from tunerkit.paths import few, is_under, join
from tunerkit.records import Foreign, Format, Target
from tunerkit.serialization.base_check import base_values, refuse_places
from tunerkit.serialization.formats import product_at, read_foreign
from tunerkit.serialization.tensor_checks import fill, limit_for, nonfinite
from tunerkit.targets import Scan

# Every method's adapters can be told to become these: their products say all.
_COMMON = "lora"


def adopt(format: Format, path: str | os.PathLike[str], scanned: Scan, adapter: str) -> tuple[Tuner, dict[str, Slot]]:
    """Read an adapter of another program, and build it for the scanned model, which is not changed.

    One warning tells the user what the adapter lost on its way.

    Args:
        format: The format of the files.
        path: The files.
        scanned: The scan of the model.
        adapter: The adapter's name.

    Raises:
        FileError: The files are damaged, or hold what tunerkit cannot.
        BaseMismatchError: They do not fit this model.
        TargetError: A weight is tied or cannot be adapted.
        UnknownMethodError: Neither the method nor LoRA is installed.
    """
    source = os.fspath(path)
    found = read_foreign(format, Path(path), scanned.root.module)
    if not found.factors:
        raise FileError(f"{source} holds no adapter: there is no target in it, so there is nothing to load")
    chosen, copies, biases, in_full = _places(found, scanned, source)
    # `refuse_places` has named the targets without a base layer.
    bases = {target.path: base for target in chosen if (base := scanned.by_path[target.path].base) is not None}
    _refuse_misfits(found, format, bases, source)
    method, told = _method_of(found, source)
    described = _descriptions(chosen, copies, biases)
    ready: Mapping[str, Adapter] | None = None
    own = found.tensors
    if method == found.method and own:
        try:
            config = hooks.structure(method, {**found.config, **described})
        except ConfigError as error:
            raise FileError(f"{source} has settings that method {method!r} rejects:\n{error}") from error
    else:
        products = {target.path: product_at(found, target.path, format) for target in chosen}
        with torch.random.fork_rng(devices=[]):  # keep the caller's random state
            config, ready = hooks.from_factors(method, chosen, tuple(bases.values()), products)
        config = attrs.evolve(config, **described)
        own = {at: made.state_dict() for at, made in ready.items()}
    tensors = {join(at, f"adapter.{name}"): tensor for at, each in own.items() for name, tensor in each.items()}
    tensors |= in_full
    tuner = Tuner(
        name=adapter,
        method=method,
        config=config,
        model=scanned.root.module,
        targets=chosen,
        copies=copies,
        biases=biases,
        progress=Progress(loaded=True),
    )
    if wrong := nonfinite(tensors, base_values(tuner)):
        raise FileError(_not_finite(source, wrong, len(tensors)))
    with torch.random.fork_rng(devices=[]):
        around = limit_for(found.config, tensors, source)
        built = injection.build_each(scanned, tuner, around=around, ready=ready)
        slots = fill(built, tensors, scanned.root.module, source, misfit="does not fit this model")
    if remarks := (*found.remarks, *told):
        warn("\n- ".join([f"{source}:", *remarks]))
    return tuner, slots


def _places(
    found: Foreign, scanned: Scan, source: str
) -> tuple[tuple[Target, ...], tuple[Target, ...], tuple[Target, ...], dict[str, Tensor]]:
    """Return the targets, the copies and the biases of an adapter, and the tensors of what it trains in full."""
    try:
        named = targets.from_paths(scanned, [*found.factors, *found.copies, *found.biases])
    except TargetError as error:
        base = f", {shown(found.base)}" if found.base else ""
        raise BaseMismatchError(f"{source} was made for another base model{base}: {error}") from error
    modules = {place.path: place for place in named}
    tensors: dict[str, Tensor] = {join(path, "bias"): bias for path, bias in found.biases.items()}
    copies: list[str] = []
    for path, own in found.copies.items():
        parts = targets.copies_at(scanned, path)
        copies += parts
        for name, tensor in own.items():
            part = max((each for each in parts if is_under(join(path, name), (each,))), key=len, default=path)
            tensors[join(part, f"copy.{join(path, name).removeprefix(part + '.')}")] = tensor
    _refuse_biases(found, scanned, source)
    chosen = _in_order([modules[path] for path in found.factors], scanned, source)
    refuse_places(scanned, chosen, copies, source)
    return chosen, targets.from_paths(scanned, copies), tuple(modules[path] for path in found.biases), tensors


def _in_order(chosen: Sequence[Target], scanned: Scan, source: str) -> tuple[Target, ...]:
    """The targets in the model's order, which allocation and files use."""
    order = {each.path: number for number, each in enumerate(scanned.modules)}
    for target in chosen:
        if len(paths := scanned.by_path[target.path].paths) > 1:
            raise TargetError(
                f"{source} adapts {target.path!r}, which is one module with {' and '.join(map(repr, paths[1:]))}: "
                "tunerkit would adapt it in all these places, and other programs only in those that they name. Give "
                "the model a module of its own in each place (copy.deepcopy)"
            )
    return tuple(sorted(chosen, key=lambda target: order[target.path]))


def _refuse_biases(found: Foreign, scanned: Scan, source: str) -> None:
    """Refuse biases of modules that have none, or add it in a way that core does not know."""
    places = {path: scanned.by_path[path] for path in found.biases}
    own = {path: torch_private.own_parameters(each.module) for path, each in places.items()}
    lacking = [path for path, each in places.items() if own[path].get(bias_name(each.base)) is None]
    if lacking:
        raise BaseMismatchError(
            f"{source} was made for another base model: it trains the biases of {few(lacking, shown=5)}, which have "
            "none here"
        )
    wrong = [
        f"{path} (a {type(each.module).__name__})" for path, each in places.items() if not targets.takes_bias(each)
    ]
    shared = [f"{path} (one module with {each.paths[1]})" for path, each in places.items() if len(each.paths) > 1]
    if wrong or shared:
        raise TargetError(
            f"{source} trains biases that tunerkit cannot train apart from their module: "
            f"{few(wrong or shared, shown=5)}. Merge the adapter in the program that trained it, and use the merged "
            "model as the base"
        )


def _refuse_misfits(found: Foreign, format: Format, bases: Mapping[str, BaseLayer], source: str) -> None:
    """Raise if a product has another shape than its target's weight, or values that are not finite."""
    problems, wrong = [], []
    for path, base in bases.items():
        product = product_at(found, path, format)
        if (shapes := misfit(base, product)) is not None:
            problems.append(f"{path} has {shapes[0]}; this model needs {shapes[1]}")
        elif nonfinite({"q": product.q, "p": product.p}):
            wrong.append(path)
    if problems:
        base_name = f", {shown(found.base)}" if found.base else ""
        raise BaseMismatchError(
            "\n- ".join([f"{source} was made for another base model{base_name}; shapes differ:", *first(problems)])
        )
    if wrong:
        raise FileError(_not_finite(source, wrong, len(bases)))


def _not_finite(source: str, wrong: list[str], total: int) -> str:
    return (
        f"{source} has NaN or inf at {len(wrong)} of {total} places: {few(wrong, shown=5)}. A model with them computes "
        "nothing useful: use an earlier checkpoint of that training"
    )


def _method_of(found: Foreign, source: str) -> tuple[str, tuple[str, ...]]:
    """Return the installed method that the adapter becomes, and what to tell the user of it."""
    listed = hooks.registry.methods()
    wanted = list(dict.fromkeys((found.method, _COMMON)))
    usable = [name for name in wanted if name in listed and listed[name].error is None]
    if not usable:
        broken = [f"\n{name} is installed and broken: {listed[name].error}" for name in wanted if name in listed]
        raise UnknownMethodError(
            f"{source} holds a {found.method} adapter, and no method is there for it: pip install "
            f"{' or '.join(f'tunerkit-{name}' for name in wanted)}{''.join(broken)}"
        )
    if usable[0] == found.method:
        return found.method, ()
    return _COMMON, (
        f"method {found.method!r} is not installed (tunerkit-{found.method}), so it becomes {_COMMON} with the rank of "
        "each target as it is: the model computes the same, and the ranks stay as they are in further training",
    )


def _descriptions(chosen: Sequence[Target], copies: Sequence[Target], biases: Sequence[Target]) -> dict[str, Any]:
    """The settings of every method that describe where the adapter is."""
    at_targets = {target.path for target in chosen}.issuperset(place.path for place in biases)
    return {
        "targets": tuple(patterns.exact_patterns([target.path for target in chosen]).values()),
        "exclude": (),
        "train_modules": tuple(patterns.exact_patterns([copied.path for copied in copies]).values()),
        "bias": "none" if not biases else "adapters" if at_targets else "all",
    }
