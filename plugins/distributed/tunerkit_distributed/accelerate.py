"""An Accelerator's checkpoints: adapters, training states and optimizer states instead of models."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import tunerkit
from tunerkit.errors import FileError
from tunerkit.plugin import Tuner
from tunerkit.plugin.trainers import folder_of, restore_, save_tuner
from tunerkit_distributed.optimizer_state import own_state, whole_state


def checkpoint_adapters_(accelerator: Any) -> None:
    """Make ``accelerator.save_state`` and ``load_state`` write and read adapters instead of whole models.

    A checkpoint then has the size of the adapters, and resuming from it is exact, also with FSDP2 and with another
    number of ranks. Accelerate's other states (schedulers, random states, scaler, registered objects) are unchanged.
    Call this once, on every rank. Attach the adapters before loading.

    Args:
        accelerator: An `accelerate.Accelerator`.
    """
    accelerator.save_state = functools.partial(_save_state, accelerator, accelerator.save_state)
    accelerator.load_state = functools.partial(_load_state, accelerator, accelerator.load_state)


def _save_state(accelerator: Any, save: Any, *args: Any, **kwargs: Any) -> Any:
    with _without_models(accelerator) as (models, optimizers):
        place = save(*args, **kwargs)
    folder = Path(place)
    tuners = _tuners(models)
    for tuner in tuners:
        save_tuner(tuner, folder_of(folder, tuners, tuner))
    for number, optimizer in enumerate(optimizers):
        state = whole_state(_torch_optimizer(optimizer))  # with the adapters' training states
        if accelerator.is_main_process:
            torch.save(state, folder / _name(number))
    accelerator.wait_for_everyone()
    return place


def _load_state(accelerator: Any, load: Any, input_dir: Any = None, *args: Any, **kwargs: Any) -> None:
    if input_dir is None:
        raise FileError("accelerator.load_state: pass the folder to load from; tunerkit does not search for the newest")
    with _without_models(accelerator) as (models, optimizers):
        load(input_dir, *args, **kwargs)
    folder = Path(input_dir)
    tuners = _tuners(models)
    for tuner in tuners:
        restore_(tuner, folder_of(folder, tuners, tuner))
    for number, optimizer in enumerate(optimizers):
        state = torch.load(folder / _name(number), map_location="cpu", weights_only=True)
        own = _torch_optimizer(optimizer)
        own.load_state_dict(own_state(own, state))
    accelerator.wait_for_everyone()


def _tuners(models: list[Any]) -> list[Tuner]:
    return [tuner for model in models for tuner in tunerkit.adapters(model).values()]


def _torch_optimizer(optimizer: Any) -> Optimizer:
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    assert isinstance(optimizer, Optimizer)
    return optimizer


def _name(number: int) -> str:
    return "optimizer.pt" if number == 0 else f"optimizer_{number}.pt"


@contextmanager
def _without_models(accelerator: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Inside the block, an Accelerator's own checkpointing skips its models and optimizers. Yields both lists."""
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield models, optimizers
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers
