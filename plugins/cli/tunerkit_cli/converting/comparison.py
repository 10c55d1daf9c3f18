"""Compare what two adapters hold: settings, places, ranks and products. No model runs, no product is multiplied."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from tunerkit import unstructure
from tunerkit.errors import BaseMismatchError
from tunerkit.paths import join
from tunerkit.plugin import Factors, Tuner, biases_of, copies_of, factors_of
from tunerkit_cli.converting.opening import collected, open_adapter

_Value = TypeVar("_Value")
EQUAL = 1e-6  # a relative difference up to which two fp32 adapters are the same
# They say where an adapter is, in patterns: the targets themselves are compared.
_PLACES = ("targets", "exclude", "layers", "train_modules", "rank_pattern", "alpha_pattern")


@attrs.frozen
class Compared:
    """How two adapters differ, the first beside the second; relative differences are sorted, the worst first."""

    one: str
    other: str
    methods: tuple[str, str]
    settings: Mapping[str, tuple[object, object]]
    only: tuple[tuple[str, ...], tuple[str, ...]]  # targets of the first and of the second one alone
    ranks: Mapping[str, tuple[int, int]]
    products: Mapping[str, float]  # 1 at a target of one of them, unless nothing is added there
    copies: Mapping[str, float]
    biases: Mapping[str, float]
    remarks: tuple[str, ...]
    largest: float  # of what they do to the model
    is_equal: bool  # in that, however they hold it


def compare_adapters(one: str, other: str, *, base: str | None, task: str | None) -> Compared:
    """Compare two adapters of one base model. Its weights are not read. Raises `TunerkitError` for other adapters."""
    with collected() as remarks:
        first, own_base = open_adapter(one, base=base, task=task, beside=other)
        second, other_base = open_adapter(other, base=base, task=task, beside=one)
        for path, (here, there) in _changed(_shapes(first), _shapes(second)).items():
            raise BaseMismatchError(
                f"{one} and {other} are of different base models, {own_base.source} and {other_base.source}: {path} "
                f"has {here} and {there}. Pass two adapters of one base"
            )
        settings = _changed(unstructure(first.config), unstructure(second.config))
        mine, theirs = factors_of(first), factors_of(second)
        only = [path for path in mine if path not in theirs], [path for path in theirs if path not in mine]
        products = _differences(relative, mine, theirs)
        copies = _differences(relative_tensor, _flat(copies_of(first)), _flat(copies_of(second)))
        biases = _differences(relative_tensor, biases_of(first), biases_of(second))
        largest = max([0.0, *products.values(), *copies.values(), *biases.values()])
        return Compared(
            one=one,
            other=other,
            methods=(first.method, second.method),
            settings={name: pair for name, pair in settings.items() if name not in _PLACES},
            only=(tuple(only[0]), tuple(only[1])),
            ranks=_changed(first.ranks(), second.ranks()),
            products=products,
            copies=copies,
            biases=biases,
            remarks=tuple(remarks),
            largest=largest,
            is_equal=largest <= EQUAL,
        )


def _changed(one: Mapping[str, _Value], other: Mapping[str, _Value]) -> dict[str, tuple[_Value, _Value]]:
    """What both have with different values, each with the two values."""
    return {name: (value, other[name]) for name, value in one.items() if name in other and other[name] != value}


def _shapes(tuner: Tuner) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the base's parameters at each target, by path and by name."""
    own = {target.path: target.module.named_parameters(recurse=False) for target in tuner.targets}
    return {path: {name: tuple(each.shape) for name, each in parameters} for path, parameters in own.items()}


def _flat(copies: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {join(path, name): tensor for path, own in copies.items() for name, tensor in own.items()}


def _differences(
    relative: Callable[[Any, Any], float], one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, float]:
    """The relative difference by name, the worst first."""
    found = {name: relative(one.get(name), other.get(name)) for name in {**one, **other}}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def norm(product: Factors) -> float:
    """Return ‖P Q‖_F of q (r, in) and p (out, r), in the time of r² (in + out)."""
    # Not by Gram matrices: their entries are squares, so that a difference below 1e-8 of the norm would be lost.
    return float(product.triplets()[1].norm())


def difference(one: Factors, other: Factors) -> float:
    """Return ‖P Q − P' Q'‖_F of two products for one weight."""
    return norm(Factors(q=torch.cat([one.q, other.q], dim=-2), p=torch.cat([one.p, -other.p], dim=-1)))


def relative(one: Factors | None, other: Factors | None) -> float:
    """Return the difference relative to the norm of ``one``, or to that of ``other`` if ``one`` is 0 or missing."""
    sizes = [norm(each) if each is not None else 0.0 for each in (one, other)]
    if one is None or other is None:
        return 1.0 if max(sizes) > 0 else 0.0
    scale = sizes[0] or sizes[1]
    return difference(one, other) / scale if scale > 0 else 0.0


def relative_tensor(one: Tensor | None, other: Tensor | None) -> float:
    """Return the largest difference relative to the largest value of ``one``, or ``other``; 1 for other shapes."""
    if one is None or other is None or one.shape != other.shape:
        return 1.0
    if one.numel() == 0:
        return 0.0
    gap = float((one.double() - other.double()).abs().max())
    scale = float(one.double().abs().max()) or float(other.double().abs().max())
    return gap / scale if scale > 0 else 0.0
