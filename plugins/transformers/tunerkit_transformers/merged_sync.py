"""Send merged weights to vLLM from TRL's trainers: TRL's walk over parameters yields them under the base's own names.

This file has all private names of TRL. Where a release lacks one, `use_vllm` is refused.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from torch import Tensor, nn
from transformers import Trainer

import tunerkit
from tunerkit.errors import StepError, TunerkitError
from tunerkit.plugin.trainers import base_modules, is_named, walk
from tunerkit_transformers.save_pretrained import is_adapter_path
from tunerkit_transformers.transformers_private import IS_QUANTISED
from tunerkit_transformers.zero_checkpoints import runs_deepspeed

Named = Iterator[tuple[str, Tensor]]
# The trainers whose walk is known, and their attribute with the object that generates and sends the weights.
_TRAINERS: Final = ("trl.trainer.grpo_trainer.GRPOTrainer", "trl.trainer.rloo_trainer.RLOOTrainer")
_GENERATION: Final = "vllm_generation"
# That object's methods: a generator of (name, tensor) of all parameters, and the name that vLLM expects for a name.
_WALK, _RENAME = "_iter_named_params", "_fix_param_name_to_vllm"

_UNKNOWN = (
    "use_vllm sends the parameters to vLLM by name. vLLM does not know the adapters' names, so completions would come "
    "from the base. Set use_vllm=False"
)
_INSTEAD = (
    "Set use_vllm=False; or run vLLM as a server of its own and send it the adapter, with tunerkit_serving.publisher"
)


def refuse_sync(trainer: Trainer) -> None:
    """Raise `StepError` if vLLM would not get the weights that the trained model has. Nothing is changed.

    The adapters are merged once and unmerged again, so what cannot be merged is refused before it is trained.
    """
    generation: Any = vars(trainer).get(_GENERATION)
    model: Any = trainer.model
    is_known = any(is_named(type(trainer), name) for name in _TRAINERS) and getattr(generation, "model", None) is model
    if not is_known or not all(hasattr(generation, name) for name in (_WALK, _RENAME)) or _is_quantised(model):
        raise StepError(_UNKNOWN)
    divided = {
        f"on {trainer.accelerator.num_processes} processes": trainer.accelerator.num_processes > 1,
        "with FSDP": trainer.is_fsdp_enabled,
        "with DeepSpeed": runs_deepspeed(trainer),
    }
    if found := next((how for how, is_so in divided.items() if is_so), None):
        raise StepError(f"use_vllm merges the adapters into a base in one process, and this trains {found}. {_INSTEAD}")
    try:
        merged = {name for name, _ in _merged(model)}
    except TunerkitError as error:
        raise StepError(f"use_vllm merges the adapters, and that fails: {error}. {_INSTEAD}") from error
    # Merging gives tied weights different values. vLLM has one parameter for them, and skips the second name silently.
    if apart := sorted(merged.difference(name for name, _ in model.named_parameters())):
        raise StepError(
            f"use_vllm sends merged weights, and {apart[0]!r} is tied to another weight, from which a merge separates "
            "it; vLLM keeps one for both. Leave the tied modules out of targets, train_modules and bias (exclude=...); "
            "or set use_vllm=False"
        )


def sync_merged_(trainer: Trainer) -> None:
    """Replace TRL's walk over the parameters, once, so that each sync sends merged weights."""
    if not sends_merged(trainer):
        generation: Any = vars(trainer)[_GENERATION]
        setattr(generation, _WALK, partial(_walk_merged, generation, getattr(generation, _WALK)))


def sends_merged(trainer: Trainer) -> bool:
    """Whether `sync_merged_` was called. This process then trains alone, whatever process group vLLM opens in it."""
    own = getattr(vars(trainer).get(_GENERATION), _WALK, None)
    return isinstance(own, partial) and own.func is _walk_merged


def _walk_merged(generation: Any, own: Callable[[], Named]) -> Named:
    """Yield what vLLM loads: (name, merged tensor). Without adapters, such as after `unwrap`, TRL's ``own`` walk."""
    if not tunerkit.adapters(generation.model):
        yield from own()
        return
    found = _merged(generation.model)
    while found:  # each tensor is freed once it is sent
        name, tensor = found.popleft()
        yield getattr(generation, _RENAME)(name), tensor


def _merged(model: Any) -> deque[tuple[str, Tensor]]:
    """Return (name, tensor) of the base's parameters with the active adapters merged.

    A merge puts new tensors into the parameters and an unmerge puts the originals back, so the merged ones are kept and
    the model is unmerged here. It never is merged while the walk waits, whoever drops it or raises. A model that the
    user has merged is read as it is and stays merged; inside `tunerkit.disabled`, `merge` raises.
    """
    is_ours = not any(slots.merged and slots.enabled for _, _, slots in walk(model))
    if is_ours:
        tunerkit.merge(model)
    try:
        named = model.named_parameters()
        return deque((name, parameter.data) for name, parameter in named if not is_adapter_path(name))
    finally:
        if is_ours:
            tunerkit.unmerge(model)


def _is_quantised(model: nn.Module) -> bool:
    """Whether a library marks a part of the model as quantized, or an adapted layer has packed weights."""
    packed = (slots.base is not None and slots.base.packing is not None for _, _, slots in walk(model))
    return any(packed) or any(getattr(part, IS_QUANTISED, False) is True for _, part in base_modules(model))
