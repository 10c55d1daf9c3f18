"""A Trainer that runs FSDP2: adapters are not sharded, and checkpoints contain adapters alone."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import Trainer

from tunerkit.errors import StepError
from tunerkit.plugin import Tuner
from tunerkit.plugin.trainers import is_sharded, walk

_LATER = "call tunerkit.attach before trainer.train() and trainer.evaluate(), which shard the model"


def leave_out_(trainer: Trainer, tuners: Sequence[Tuner]) -> None:
    """Exclude the adapters from sharding: each rank holds them whole, and their gradients are averaged.

    Without FSDP this does nothing.

    Args:
        trainer: The trainer, which has not sharded its model yet.
        tuners: The adapters that it will drive.

    Raises:
        StepError: The trainer runs FSDP1, or FSDP2 with a setting that shards every parameter; or the model is sharded.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise StepError(
            "a Trainer that runs FSDP1 cannot be attached: it flattens the adapters into one tensor for each process, "
            'so no step sees a whole adapter. Set "version": 2 in fsdp_config'
        )
    if plugin.cpu_ram_efficient_loading:
        raise StepError(
            "a Trainer with cpu_ram_efficient_loading cannot be attached: accelerate then shards every tensor, the "
            'adapters\' too. Set "cpu_ram_efficient_loading": False in fsdp_config'
        )
    for tuner in tuners:
        if any(map(is_sharded, tuner.parameters())):
            raise StepError(f"FSDP2 has sharded adapter {tuner.name!r} already; {_LATER}")
    model = tuners[0].model
    slots = [each for _, _, each in walk(model)]
    for each in slots:
        each.to(trainer.accelerator.device)  # FSDP2 moves only what it shards
    ignored = _modules(plugin.ignored_modules, model)
    plugin.ignored_modules = [*ignored, *(each for each in slots if each not in ignored)]


def _modules(ignored: str | Iterable[nn.Module] | None, model: nn.Module) -> list[nn.Module]:
    """Return the modules of accelerate's setting ``ignored_modules``, which may be a regular expression of paths."""
    if isinstance(ignored, str):
        return [module for path, module in model.named_modules() if re.fullmatch(ignored, path)]
    return [] if ignored is None else list(ignored)


def refuse_other_shards(trainer: Trainer) -> None:
    """Raise `StepError` if the optimizer trains sharded parameters: a checkpoint would have only one rank's shards."""
    if not trainer.is_fsdp_enabled or trainer.optimizer is None:
        return
    trained = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    sharded = sum(map(is_sharded, trained))
    if sharded:
        raise StepError(
            f"besides the adapters, the optimizer trains {sharded} parameters of the base, which FSDP2 shards, and "
            "checkpoints hold adapters alone: freeze them, or train their modules in full with train_modules"
        )
