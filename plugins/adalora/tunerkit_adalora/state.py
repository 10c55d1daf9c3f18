"""Save and restore AdaLoRA's training state."""

import itertools
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from tunerkit.plugin import FileError, Pieces, State, StepError, Tuner
from tunerkit_adalora.contradictions import contradictions, impossible_averages
from tunerkit_adalora.gradient_counts import GradientCount
from tunerkit_adalora.importance import average_dtype, new_averages, stacks_of, unstack
from tunerkit_adalora.state_values import WHAT_FITS, SavedValues, flags_of, read_values
from tunerkit_adalora.svd_layer import SvdLayer, weights_of
from tunerkit_adalora.training import Training, layers_of, training_of

_SHOWN = 12  # problems in an error: there may be one for each weight


def state(tuner: Tuner) -> State:
    """Return the averages, the masks, and the position in the schedule.

    Args:
        tuner: The tuner.

    Returns:
        The state, which is empty if the tuner is not attached. Tensor names end in the number of the weight or layer.
    """
    if not isinstance(tuner.state, Training):
        return State(tensors={}, values={})
    training = tuner.state
    values = SavedValues(
        initial=training.schedule.initial,
        target=training.schedule.target,
        last_step=training.last_step,
        in_force=training.in_force,
        averaged=training.gradients.averaged,
        seen=training.gradients.seen,
        left_out=int(training.gradients.left_out),
        **flags_of(training.phase),
    )
    layers = layers_of(tuner)
    sensitivity, uncertainty = training.averages
    pieces = _pieces_of_averages(tuner, layers if training.running else [])
    whole = pieces.joined([*sensitivity, *uncertainty], f"the averages of adapter {tuner.name!r}")
    averages = whole[: len(sensitivity)], whole[len(sensitivity) :]
    return State(tensors=_named(*averages, [layer.mask for layer in layers]), values=attrs.asdict(values))


def restore(tuner: Tuner, saved: State) -> None:
    """Restore the training state that `state` returned; the weights come from the adapter's file.

    All checks come first: if an error is raised, nothing has changed.

    Args:
        tuner: The attached tuner.
        saved: The result of `state`.

    Raises:
        FileError: A value is missing, of another type, or out of range, or the state contradicts itself or the
            adapter.
        StepError: Averages or masks do not fit the adapter, or the tuner is not attached.
    """
    training = training_of(tuner)
    layers = layers_of(tuner)
    values = read_values(saved.values)
    pieces = _pieces_of_averages(tuner, [] if values.phase.is_final else layers)
    found = _fitting(layers, pieces, saved)
    masks = [saved.tensors[f"mask.{i}"].to(layer.mask.device, copy=True) for i, layer in enumerate(layers)]
    problems = [
        *contradictions(tuner, training, values, layers, masks),
        *impossible_averages(found, values.phase),
    ]
    if problems:
        raise FileError(f"the training state cannot be restored: {_listed(problems)}. {WHAT_FITS}")
    running = new_averages(pieces.values[: len(found) // 2])
    for average, value in zip(
        itertools.chain(*unstack(stacks_of(running))), pieces.cut([*found.values()]), strict=True
    ):
        average.copy_(value)
    left_out = torch.full_like(training.gradients.left_out, values.left_out)
    restored = attrs.evolve(
        training,
        layers=layers,
        schedule=attrs.evolve(training.schedule, initial=values.initial, target=values.target),
        running=running,
        gradients=GradientCount(left_out, averaged=values.averaged, seen=values.seen),
        in_force=values.in_force,
        sizes=[layer.lam.numel() for layer in layers],
        last_step=values.last_step,
        phase=values.phase,
    )
    for layer, mask in zip(layers, masks, strict=True):
        layer.mask = mask
    tuner.state = restored


def _pieces_of_averages(tuner: Tuner, layers: Sequence[SvdLayer]) -> Pieces:
    """Return this process's shards of the two running averages of each weight, which are sharded like the weight."""
    weights = weights_of(layers)
    return tuner.pieces([*weights, *weights])


def _fitting(layers: Sequence[SvdLayer], pieces: Pieces, saved: State) -> dict[str, Tensor]:
    """Return the full averages in a state, by name. Raises `StepError` if the state does not fit the layers."""
    weights = weights_of(layers) if pieces.values else []
    averages = [torch.empty(w.shape, dtype=average_dtype(w.dtype), device="meta") for w in weights]
    named = _named(averages, averages, [layer.mask for layer in layers])
    expected, found = _shapes(named), _shapes(saved.tensors)
    if expected != found:
        problems = [f"{name!r} is missing" for name in expected if name not in found]
        problems += [f"{name!r} is not expected" for name in found if name not in expected]
        both = [name for name in expected if name in found and expected[name] != found[name]]
        problems += [f"{name!r} has another shape or dtype" for name in both]
        raise StepError(f"the saved averages and masks do not fit this adapter: {_listed(problems)}. {WHAT_FITS}")
    return {name: saved.tensors[name] for name in _named(averages, averages, [])}


def _listed(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def _named(sensitivity: Sequence[Tensor], uncertainty: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names in a file."""
    lists = {"sensitivity": sensitivity, "uncertainty": uncertainty, "mask": masks}
    return {f"{name}.{i}": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
