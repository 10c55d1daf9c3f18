"""The hooks: trainers, runs, and facts about the models of transformers and of related libraries."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from tunerkit.plugin import BaseLayer, DefaultTargets, ModelLibrary, Tuner, WeightReader, hookimpl
from tunerkit.plugin.trainers import format_at, is_foreign, is_named
from tunerkit_transformers.adapter_calls import unwatch_calls_, watch_calls_
from tunerkit_transformers.base_layers import Conv1DLayer, FalconLinearLayer, ScaledEmbeddingLayer
from tunerkit_transformers.default_targets import DEFAULT_TARGETS
from tunerkit_transformers.forward_config import forward_config
from tunerkit_transformers.model_library import labels_hint, tied_flags
from tunerkit_transformers.new_modules import find_new, named_heads
from tunerkit_transformers.reference import end_generation_, reference
from tunerkit_transformers.save_pretrained import unwatch_saving_, watch_saving_
from tunerkit_transformers.transformers_private import LOADED
from tunerkit_transformers.weight_readers import WEIGHT_READERS

_TRAINER = "transformers.trainer.Trainer"
# Attributes of which a model of transformers, timm or a library like them has one, or one of its modules.
_MARKS = ("config", "save_pretrained", "get_output_embeddings", "get_classifier", "pretrained_cfg")


def may_be_known(model: nn.Module) -> bool:
    """Whether a model has attributes that transformers or a similar library sets on modules or parameters."""
    marked = (module for module in model.modules() for name in _MARKS if hasattr(module, name))
    loaded = (parameter for parameter in model.parameters() if hasattr(parameter, LOADED))
    return any(True for _ in chain(marked, loaded))


@hookimpl
def tunerkit_base_layers() -> Iterable[type[BaseLayer]]:
    """Return the kinds of the layers that transformers defines itself."""
    return [Conv1DLayer, FalconLinearLayer, ScaledEmbeddingLayer]


@hookimpl
def tunerkit_model_libraries() -> Iterable[ModelLibrary]:
    """Return the knowledge of transformers' models, and of timm's heads."""
    return [
        ModelLibrary(
            applies=may_be_known,
            heads=named_heads,
            new=find_new,
            settings=forward_config,
            tied_flags=tied_flags,
            resize_hint=labels_hint,
        )
    ]


@hookimpl
def tunerkit_default_targets() -> Iterable[DefaultTargets]:
    """Return the default targets of known architectures."""
    return DEFAULT_TARGETS


@hookimpl
def tunerkit_weight_readers() -> Iterable[WeightReader]:
    """Return the classes that use a child's weight without calling the child."""
    return WEIGHT_READERS


@hookimpl
def tunerkit_wrapped(model: nn.Module) -> None:
    """Watch ``save_pretrained`` and PEFT's calls, and let a Trainer train quantized models."""
    if may_be_known(model):
        watch_saving_(model)
    watch_calls_(model)  # also on models of others, for which people write PEFT's calls


@hookimpl
def tunerkit_unwrapped(model: nn.Module) -> None:
    """Undo `tunerkit_wrapped`, and invalidate the model's references."""
    unwatch_saving_(model)
    unwatch_calls_(model)
    end_generation_(model)


@hookimpl
def tunerkit_attach(
    tuners: Sequence[Tuner], candidate: Any, total_steps: int | None, data_parallel: bool | None
) -> bool | None:
    """Attach to a Trainer or a derived class, such as TRL's."""
    if not is_named(type(candidate), _TRAINER):
        return None
    from tunerkit_transformers.attaching import attach_trainer  # importing transformers takes seconds

    attach_trainer([*tuners], candidate, total_steps, data_parallel)
    return True


@hookimpl(trylast=True)  # more specific plugins come first
def tunerkit_reference(model: nn.Module) -> nn.Module:
    """Make a reference that shares the model's weights."""
    return reference(model)


@hookimpl(trylast=True)  # it answers for every folder, so more specific plugins come first
def tunerkit_open_run(path: Path, base: str | None) -> tuple[nn.Module, object]:
    """Load a run of ``tunerkit train``, or an adapter of another program. Raises `RunError` for any other folder."""
    from tunerkit_transformers.adapter_files import is_run
    from tunerkit_transformers.output_folder import load_run, read_run

    if not is_run(str(path)) and (is_foreign(str(path)) or format_at(path) is not None):
        from tunerkit_transformers.foreign_folder import load_foreign

        return load_foreign(str(path), base)
    loaded = load_run(read_run(path), base)
    return loaded.model, loaded.processor
