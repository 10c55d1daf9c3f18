"""AdaLoRA's training state on its way to a file and back."""

from collections.abc import Sequence

import attrs
from torch import Tensor

from tunerkit import State, StepError, Tuner
from tunerkit_adalora.svd_layer import SvdLayer
from tunerkit_adalora.training import Training, layers_of, training_of


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
        "averaged": training.averaged,
        "seen": training.seen,
        "left_out": int(training.left_out),
    }
    return State(tensors=_tensors(training, layers_of(tuner)), values=values)


def restore(tuner: Tuner, saved: State) -> None:
    """Go on where `state` was taken; the weights are those of the adapter's own file.

    Raises `StepError`, and changes nothing, if averages and masks do not fit the adapter.
    """
    training = training_of(tuner)
    layers = layers_of(tuner)
    number = {name: int(str(value)) for name, value in saved.values.items() if not isinstance(value, bool)}
    final = bool(saved.values["final"])
    own = {n: t for n, t in _tensors(training, layers).items() if n.startswith("mask.") or not final}
    if {n: (t.shape, t.dtype) for n, t in own.items()} != {n: (t.shape, t.dtype) for n, t in saved.tensors.items()}:
        raise StepError("the saved averages and masks do not fit this adapter; load the adapter they were saved with")
    for name, tensor in own.items():
        tensor.copy_(saved.tensors[name])
    if final:
        training.sensitivity, training.uncertainty = [], []
    training.schedule = attrs.evolve(training.schedule, initial=number["initial"], target=number["target"])
    training.final, training.shrunk = final, bool(saved.values["shrunk"])
    training.last_step, training.in_force = number["last_step"], number["in_force"]
    training.averaged, training.seen = number["averaged"], number["seen"]
    training.sizes = [len(layer.lam) for layer in layers]
    training.left_out.fill_(number["left_out"])


def _tensors(training: Training, layers: Sequence[SvdLayer]) -> dict[str, Tensor]:
    """What `state` saves and `restore` fills, by position."""
    tensors = {f"sensitivity.{i}": t for i, t in enumerate(training.sensitivity)}
    tensors |= {f"uncertainty.{i}": t for i, t in enumerate(training.uncertainty)}
    return tensors | {f"mask.{i}": layer.mask for i, layer in enumerate(layers)}
