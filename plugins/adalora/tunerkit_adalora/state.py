"""AdaLoRA's training state on its way to a file and back."""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from tunerkit import State, StepError, Tuner
from tunerkit_adalora.importance import new_stacks, unstack
from tunerkit_adalora.training import Training, layers_of, training_of, weights_of


def state(tuner: Tuner) -> State:
    """The averages and masks by position, and where in the schedule training stands."""
    if not isinstance(tuner.state, Training):
        return State(tensors={}, values={})
    training = tuner.state
    values = {
        "initial": training.schedule.initial,
        "target": training.schedule.target,
        "last_step": training.last_step,
        "in_force": training.in_force,
        "final": training.final,
        "shrunk": training.shrunk,
        "blank": training.blank,
        "anew": training.anew,
        "averaged": training.averaged,
        "seen": training.seen,
        "left_out": int(training.left_out),
    }
    masks = [layer.mask for layer in layers_of(tuner)]
    return State(tensors=_named(*training.averages, masks), values=values)


def restore(tuner: Tuner, saved: State) -> None:
    """Go on where `state` was taken; the weights are those of the adapter's own file.

    Raises `StepError`, and changes nothing, if averages and masks do not fit the adapter.
    """
    training = training_of(tuner)
    layers = layers_of(tuner)
    number = {name: int(str(value)) for name, value in saved.values.items() if not isinstance(value, bool)}
    final = bool(saved.values["final"])
    stacks = [] if final else new_stacks(weights_of(layers))
    averages = unstack(stacks)
    if _shapes(_named(*averages, [layer.mask for layer in layers])) != _shapes(saved.tensors):
        raise StepError("the saved averages and masks do not fit this adapter; load the adapter they were saved with")
    for name, average in _named(*averages, []).items():
        average.copy_(saved.tensors[name])
    training.layers, training.stacks = layers, stacks
    for i, layer in enumerate(layers):
        layer.mask = saved.tensors[f"mask.{i}"].to(layer.mask.device, copy=True)
    training.schedule = attrs.evolve(training.schedule, initial=number["initial"], target=number["target"])
    training.final, training.shrunk = final, bool(saved.values["shrunk"])
    training.blank, training.anew = bool(saved.values["blank"]), bool(saved.values["anew"])
    training.last_step, training.in_force = number["last_step"], number["in_force"]
    training.averaged, training.seen = number["averaged"], number["seen"]
    training.sizes = [len(layer.lam) for layer in layers]
    training.left_out.fill_(number["left_out"])


def _named(sensitivity: Sequence[Tensor], uncertainty: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that a file has them by."""
    lists = {"sensitivity": sensitivity, "uncertainty": uncertainty, "mask": masks}
    return {f"{name}.{i}": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
