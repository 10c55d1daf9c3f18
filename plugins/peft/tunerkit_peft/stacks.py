"""Stacks of experts: where a model has them, and which of their sides PEFT's packed matrices belong to.

A stack is one parameter (E, s1, s2) of an experts module with the matrices of all E experts. PEFT wraps the experts
module once for each parameter, and packs A expert by expert, (E r, i), and B with the expert fastest, (o, r E).
"""

import re
from collections.abc import Collection, Mapping
from typing import Final, Protocol, runtime_checkable

import attrs
from torch import Tensor, nn

from tunerkit.plugin import Factors

CHILD: Final = ".stacks."  # between an experts module and the name of its parameter, in paths of targets
LEVEL: Final = ".base_layer"  # PEFT's name of what a wrapper wraps
_RELEASE: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:\.post\d+)?")
GATED: Final = "gate_up_proj"


@runtime_checkable
class StackModule(Protocol):
    """The module that stands for a stack, as the plugin for experts has it."""

    name: str
    count: int
    in_features: int
    out_features: int
    is_transposed: bool


@attrs.frozen
class Stack:
    """One stack of a model.

    Attributes:
        path: The path of its module.
        experts: The path of the experts module.
        parameter: The name of the parameter.
        count: E.
        in_features: The features of a row.
        out_features: The features of its output.
        is_transposed: Whether the parameter is (E, in, out).
        is_marked: Whether its class says so to PEFT. Llama 4's does not, and is transposed.
        is_concatenated: Whether the rows of gate and up are two halves; else they alternate.
    """

    path: str
    experts: str
    parameter: str
    count: int
    in_features: int
    out_features: int
    is_transposed: bool
    is_marked: bool
    is_concatenated: bool

    @property
    def owner(self) -> str:
        """The path of the parameter, by which PEFT's settings name it."""
        return f"{self.experts}.{self.parameter}"

    @property
    def is_square(self) -> bool:
        """Whether shapes say nothing of the sides."""
        return self.in_features == self.out_features

    def is_swapped(self, version: str) -> bool | None:
        """Return whether a version of PEFT takes s2 for the input's side; None if it does not say.

        No version up to 0.18 does. 0.19.0 does so where the class says that it is transposed, and later ones where it
        does not.
        """
        found = _RELEASE.fullmatch(version)
        if found is None:
            return None
        release = tuple(map(int, found.groups()))
        if release < (0, 19, 0):
            return False
        return self.is_marked if release == (0, 19, 0) else not self.is_marked

    def is_straight(self, *, swapped: bool) -> bool:
        """Whether PEFT's A belongs to the input, so that it is ours; else it is the transpose of our B."""
        return swapped != self.is_transposed


def stacks_of(modules: Mapping[str, nn.Module]) -> dict[str, Stack]:
    """Return the stacks of a model by the paths of their modules, in the order in which PEFT wraps them."""
    found = {}
    for path, module in modules.items():
        experts, child, parameter = path.rpartition(CHILD)
        owner = modules.get(experts)
        if not child or owner is None or not isinstance(module, StackModule) or module.name != parameter:
            continue
        found[path] = Stack(
            path,
            experts,
            parameter,
            module.count,
            module.in_features,
            module.out_features,
            module.is_transposed,
            is_marked=bool(getattr(owner, "is_transposed", False)),
            is_concatenated=bool(getattr(owner, "is_concatenated", True)),
        )
    places = {path: number for number, path in enumerate(modules)}
    order = {
        stack.path: (places[stack.experts], own_parameters(modules[stack.experts]).index(stack.parameter))
        for stack in found.values()
    }
    return {path: found[path] for path in sorted(found, key=order.__getitem__)}


def own_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters, in order."""
    return [name for name, _ in module.named_parameters(recurse=False)]


def is_named(parameter: str, names: Collection[str]) -> bool:
    """Whether PEFT's ``target_parameters`` name the parameter at a path."""
    return any(f".{parameter}".endswith(f".{name}") for name in names)


def packed(product: Factors, stack: Stack, version: str) -> tuple[Tensor, Tensor]:
    """Return A (E r, i) and B (o, r E) of a product, q (E, r, in) and p (E, out, r), for a release of PEFT."""
    swapped = stack.is_swapped(version)
    assert swapped is not None
    q, p = product if stack.is_straight(swapped=swapped) else (product.p.mT, product.q.mT)
    return q.flatten(0, 1), p.permute(1, 2, 0).flatten(1)


def unpacked(a: Tensor, b: Tensor, stack: Stack, *, swapped: bool) -> Factors:
    """Return the product of A (E r, i) and B (o, r E): q (E, r, in) and p (E, out, r)."""
    q = a.unflatten(0, (stack.count, -1))
    p = b.unflatten(1, (-1, stack.count)).permute(2, 0, 1)
    return Factors(q=q, p=p) if stack.is_straight(swapped=swapped) else Factors(q=p.mT, p=q.mT)
