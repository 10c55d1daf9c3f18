"""Changes of the base model that no adapter's file holds: parameters thawed after wrapping, and embeddings resized."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from tunerkit.errors import TunerkitWarning
from tunerkit.injection.slots import base_modules, slots_of
from tunerkit.injection.tuner import Tuner, wrapped_of
from tunerkit.libraries import torch_private, whole_shape
from tunerkit.paths import few, is_under, join, parent

_SHOWN = 3
_SAVE_BASE = "save the base too, inside tunerkit.disabled(model), and load the adapter onto that"


class _Own(NamedTuple):
    """A parameter of the base itself; ``covered`` if a trained copy of its module is used instead."""

    name: str
    parameter: nn.Parameter
    covered: bool


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's own parameters by name."""
    return {own.name: tuple(whole_shape(own.parameter)) for own in _base(model)}


def warn_of_base_changes(tuners: Sequence[Tuner], *, again: bool = True) -> None:
    """Warn, for each cause once, if the base under ``tuners``, adapters of one model, is trained or was resized.

    Args:
        tuners: The adapters.
        again: Whether to repeat what an earlier warning has said of this model.
    """
    base, told = list(_base(tuners[0].model)), wrapped_of(tuners[0].model).told
    thawed = [own.name for own in base if own.parameter.requires_grad and not own.covered]
    resized = list(dict.fromkeys(line for tuner in tuners for line in _resized(base, tuner.progress.shapes)))
    for names, text in ((thawed, _THAWED), (resized, _RESIZED)):
        if names and (again or not told.issuperset(names)):
            modules = list(dict.fromkeys(parent(name) or name for name in names))[:_SHOWN]
            listed = few(names, shown=_SHOWN)
            warnings.warn(text.format(listed=listed, modules=modules), TunerkitWarning, stacklevel=3)
            told.update(names)


def _resized(base: Sequence[_Own], before: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What has another shape than when an adapter was put in. Packing, as on the way to a GPU, is no resizing."""
    for name, parameter, _ in base:
        shape = whole_shape(parameter)
        was = before.get(name, shape)
        if was != shape and parameter.is_floating_point():
            yield f"{name} {list(was)} -> {list(shape)}"


def _base(model: nn.Module) -> Iterator[_Own]:
    copied: set[str] = set()
    for path, module in base_modules(model):
        slots = slots_of(module)
        if slots is not None and slots.copies:
            copied.add(path)
        covered = is_under(path, copied)
        for name, parameter in torch_private.own_parameters(module).items():
            if parameter is not None:
                yield _Own(join(path, name), parameter, covered)


_THAWED = (
    "parameters of the base require gradients: {listed}. If they are trained, no adapter's file holds their values, "
    "and the file fits no other base. To keep them in the adapter, name their modules when you wrap, as in "
    "train_modules={modules}, or set bias for biases. Otherwise freeze them, or " + _SAVE_BASE
)
_RESIZED = (
    "parameters of the base have been resized since the adapter was put in: {listed}. No adapter's file holds new "
    "rows, and the file fits only a base with the same ones. Resize the model before tunerkit.wrap, and name the "
    "embeddings in train_modules to train the new rows; or " + _SAVE_BASE
)
