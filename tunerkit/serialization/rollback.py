"""Restore a training state completely or not at all, whatever the method's plugin does."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tunerkit.injection import Tuner
from tunerkit.steps import optimizer_of


@contextmanager
def all_or_nothing(tuner: Tuner) -> Iterator[None]:
    """Undo what happens to an adapter inside the block if the block raises.

    That is: its tensors, the method's training state, the step count and the history. The Parameter objects stay the
    same. The copies live as long as the block.

    Args:
        tuner: The adapter's handle.
    """
    progress = tuner.progress
    slots = [(slot, {name: value.clone() for name, value in slot.state_dict().items()}) for _, slot in tuner.slots()]
    state, steps, history = _copy_of_state(tuner), progress.steps, list(progress.history)
    try:
        yield
    except BaseException:
        for slot, values in slots:
            with torch.no_grad():
                slot.load_state_dict(values)
        progress.state, progress.steps = state, steps
        progress.history[:] = history
        raise


def _copy_of_state(tuner: Tuner) -> object:
    """A copy of the method's training state that refers to the live model, as the state itself does."""
    model = tuner.model
    live = [tuner, optimizer_of(tuner), *model.modules(), *model.parameters(), *model.buffers()]
    return copy.deepcopy(tuner.progress.state, {id(part): part for part in live})
