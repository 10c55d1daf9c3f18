"""Splits an optimizer's parameter groups where methods ask for another learning rate or weight decay."""

from collections.abc import Iterable
from typing import Any

from tunerkit import hooks
from tunerkit.injection.tuner import Tuner


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
