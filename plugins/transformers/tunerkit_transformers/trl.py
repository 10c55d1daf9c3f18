"""Undo changes of TRL's trainers to a wrapped model: a second base as the reference, casts, and bypassed heads."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from tunerkit.errors import StepError, warn
from tunerkit.plugin import Tuner
from tunerkit.plugin.trainers import inside
from tunerkit_transformers.head_weights import refuse_heads, settle_heads_
from tunerkit_transformers.merged_sync import refuse_sync, sync_merged_
from tunerkit_transformers.reference import Reference, reference
from tunerkit_transformers.stored_weights import differs_from_stored


def refuse_unfit(trainer: Trainer, tuners: list[Tuner]) -> None:
    """Raise `StepError` if one of TRL's trainers cannot train the adapters with its settings. Nothing is changed."""
    if _is_of_trl(trainer):
        _refuse_options(trainer)
        _refuse_other_reference(trainer, tuners[0].model)
        refuse_heads(trainer, tuners)


def settle_(trainer: Trainer, tuners: list[Tuner]) -> None:
    """Restore dtypes, replace the reference that TRL loaded, apply adapters of output heads, and sync merged weights.

    Trainers of other libraries are not changed. Call `refuse_unfit` first.
    """
    if not _is_of_trl(trainer):
        return
    _restore_dtypes_(trainer, tuners)
    _settle_reference_(trainer, tuners[0].model)
    settle_heads_(trainer, tuners)
    if vars(trainer.args).get("use_vllm"):
        sync_merged_(trainer)


def _refuse_options(trainer: Trainer) -> None:
    """Raise `StepError` for an option that would move or cast the weights of adapters, or generate without them."""
    options = vars(trainer.args)
    if options.get("sync_ref_model"):
        raise StepError(
            "sync_ref_model moves a second full model towards the trained one, and a model with adapters has no second "
            "one: its reference is frozen. Set sync_ref_model=False"
        )
    if options.get("use_vllm"):
        refuse_sync(trainer)
    paged = [name for name in _PAGED if options.get(name)]
    if paged and (trainer.args.bf16 or trainer.args.fp16):
        raise StepError(
            f"{paged[0]} casts the whole model to half precision for each generation, so adapters would be trained "
            f"in half precision too; set {paged[0]}=False, or bf16=False and fp16=False"
        )


# The options of GRPO and RLOO with which TRL generates through `generate_batch`, after a cast of the whole model.
_PAGED = ("use_transformers_paged", "use_transformers_continuous_batching")


def _restore_dtypes_(trainer: Trainer, tuners: list[Tuner]) -> None:
    """Undo TRL's cast of all trainable parameters to bf16, which TRL does for a base quantized to 4 or 8 bits."""
    own: Any = trainer.model
    if not any(getattr(own, mark, False) for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit")):
        return
    for tuner in tuners:
        for adapter in tuner.adapters().values():
            adapter.to(getattr(torch, tuner.config.adapter_dtype))
        trained = dict(tuner.named_parameters())
        for place in (*tuner.targets, *tuner.copies, *tuner.biases):
            for name, original in place.module.named_parameters():
                for copied in ("copy." + name, "bias" if name in _BIASES else ""):
                    parameter = trained.get(f"{place.path}.{copied}".lstrip("."))
                    if parameter is not None:
                        parameter.data = parameter.data.to(original.dtype)


# The names of a module's own bias, of which an adapter may train a copy; the second is torch's attention's.
_BIASES = ("bias", "in_proj_bias")


def _refuse_other_reference(trainer: Any, model: nn.Module) -> None:
    held = vars(trainer).get("ref_model")
    inner = None if held is None else inside(held)
    if isinstance(inner, Reference) and inner.source is not model:
        raise StepError(
            "the trainer's ref_model is the reference of another model; pass tunerkit.reference(model) of the model "
            "that it trains"
        )


def _settle_reference_(trainer: Any, model: nn.Module) -> None:
    """Replace a reference model that TRL loaded; keep one that the user chose."""
    held = vars(trainer).get("ref_model")
    if held is None:
        return
    inner = inside(held)
    if isinstance(inner, Reference) or not _may_be_loaded_by_trl(inner, model, trainer):
        return
    trainer.ref_model = None
    trainer.accelerator.free_memory()  # the list of prepared models still holds it; each call of train empties it too
    trainer.ref_model = reference(model)
    warn(
        f"{type(trainer).__name__} had loaded {type(model).__name__} a second time from {_checkpoint_of(model)!r} as "
        "its reference model. It was dropped: the reference is now the trained model as it stands, tunerkit.reference("
        "model). Where the trainer takes a ref_model, pass that, and nothing is loaded. If the reference was yours, "
        "freeze it with requires_grad_(False) before you pass it, or set trainer.ref_model after attach"
    )


def _may_be_loaded_by_trl(held: nn.Module, model: nn.Module, trainer: Any) -> bool:
    """Whether ``held`` looks like the reference that TRL loads if it gets no ``ref_model``.

    A trainer does not record who loaded the model. But TRL loads the checkpoint unchanged and unfrozen, so a model that
    is frozen or differs from the checkpoint is the user's. A comparison with the trained model's weights would prove
    nothing: they may contain a merged adapter. An unfrozen model equal to the checkpoint counts as TRL's: if that is
    wrong, the warning says how to keep it, but a wrong reference would go unnoticed.
    """
    checkpoint = _checkpoint_of(held)
    if type(held) is not type(model) or not checkpoint or checkpoint != _checkpoint_of(model):
        return False
    if not any(parameter.requires_grad for parameter in held.parameters()):
        return False
    options = vars(trainer.args).get("model_init_kwargs") or {}
    loaded = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return not (isinstance(held, PreTrainedModel) and differs_from_stored(held, loaded, options))


def _checkpoint_of(model: nn.Module) -> str | None:
    """Return the name or folder from which a transformers model was loaded."""
    match model:
        case nn.Module(config=object(name_or_path=str(name))):
            return name
    return None


def _is_of_trl(trainer: object) -> bool:
    """Whether the class of ``trainer`` is one of TRL's, or derives from one."""
    return any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__)
