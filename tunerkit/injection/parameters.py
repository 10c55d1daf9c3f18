"""The parameters that are trained: how many, and the optimizer's groups of those for which methods set something."""

from collections.abc import Iterable
from typing import Any

import attrs
from torch import nn

from tunerkit import hooks
from tunerkit.injection.models import inside
from tunerkit.injection.tuner import Tuner, tuners_of
from tunerkit.layers import whole_shape


@attrs.frozen
class Summary:
    """The numbers of parameters of a model.

    Attributes:
        trainable: The parameters that are trained now.
        total: All parameters, those of the adapters included.
        adapters: The parameters that each adapter trains, by its name.
    """

    trainable: int
    total: int
    adapters: dict[str, int]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2f} %)"


def trainable_parameters(model: nn.Module) -> Summary:
    """Count the parameters that a model trains.

    Args:
        model: A model, wrapped or not.

    Returns:
        The counts. Printed, they give the share: ``"1,536 of 66,048 parameters are trained (2.33 %)"``.

    Raises:
        AdapterError: ``model`` is not a module, or several parts of it were wrapped on their own.
    """
    parameters = list(inside(model).parameters())
    return Summary(
        trainable=_count(p for p in parameters if p.requires_grad),
        total=_count(parameters),
        adapters={
            name: _count(p for p in tuner.parameters() if p.requires_grad) for name, tuner in tuners_of(model).items()
        },
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(whole_shape(parameter).numel() for parameter in parameters)


def regrouped(groups: Iterable[dict[str, Any]], tuners: Iterable[Tuner]) -> list[dict[str, Any]]:
    """Split ``groups`` so that the parameters for which methods set something are in groups of their own.

    Args:
        groups: Groups as an optimizer takes them, each with ``params`` and ``lr``.
        tuners: The adapters whose methods are asked.

    Returns:
        The groups without what was split off, which may leave some empty, and then the new ones. Each parameter is in
        one of them. If no method asks for anything, they are as before, so that an optimizer's state of them still
        fits.
    """
    wanted = [group for tuner in tuners for group in hooks.param_groups(tuner)]
    number = {id(parameter): at for at, group in enumerate(wanted) for parameter in group.parameters}
    plain: list[dict[str, Any]] = []
    split: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[int | None, list[Any]] = {None: []}
        for parameter in group["params"]:
            parts.setdefault(number.get(id(parameter)), []).append(parameter)
        for at, parameters in parts.items():
            if at is None:
                plain.append({**group, "params": parameters})
            else:
                other = wanted[at]
                decay = {} if other.weight_decay is None else {"weight_decay": other.weight_decay}
                split.append({**group, "params": parameters, "lr": group["lr"] * other.lr_scale, **decay})
    return [*plain, *split]
