"""Losses that multiply by an output head's weight themselves, as TRL's do: they read it with its adapters applied."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.errors import StepError, warn
from tunerkit.injection import (
    WATCHED,
    Slots,
    Tuner,
    adapted_tensors,
    adds_nothing,
    base_modules,
    inside,
    slots_of,
    tuners_of,
)
from tunerkit.layers import autocast_off
from tunerkit_transformers.output_heads import named_heads

if TYPE_CHECKING:
    from transformers import Trainer

_MARK = "_tunerkit_shows_heads"
_FUSED = "fused_lm_head"  # the argument by which a forward that TRL has replaced multiplies by the weight itself
_REDIRECTION = "_forward_redirection"  # with which TRL runs a loss of its own in place of a model's forward


def refuse_heads(trainer: Any, tuners: list[Tuner]) -> None:
    """Raise `StepError` if a loss reads the weight of an adapted head that cannot be shown with its adapters applied.

    The loss would ignore them, and train none of them. Nothing is changed.
    """
    models = _read_models(trainer, tuners)
    for model in models:
        _refuse_unfit(trainer, model)
    if models and vars(trainer.args).get("precompute_ref_log_probs"):
        held = vars(trainer).get("ref_model")
        _refuse_computed(tuners[0].model if held is None else inside(held))


def settle_heads_(trainer: Any, tuners: list[Tuner]) -> None:
    """Let a trainer whose loss reads the weights of adapted output heads see them with the adapters applied.

    That goes for the trained model, and for a reference and a teacher. Without such a head this does nothing, and
    neither where the trainer calls it, as `CPOTrainer` does.
    """
    models = _read_models(trainer, tuners)
    for model in filter(_forward_of_trl, models):
        _show_in_forward_(model)
    if tuners[0].model in models:
        _warn_of_dropout(trainer, tuners)
    redirect = vars(trainer).get(_REDIRECTION)
    if models and redirect is not None:
        setattr(trainer, _REDIRECTION, functools.partial(_redirect, getattr(redirect, "args", [redirect])[0], models))


def _read_models(trainer: Any, tuners: list[Tuner]) -> list[nn.Module]:
    """The models with adapted output heads whose weights the trainer's loss reads itself."""
    others = [vars(trainer).get(name) for name in ("ref_model", "teacher_model")]
    every = (tuners[0].model, *map(inside, filter(None, others)))
    redirects = vars(trainer).get(_REDIRECTION) is not None
    return [model for model in every if _adapted_heads(model) and (redirects or _forward_of_trl(model) is not None)]


def refuse_liger(trainer: "Trainer", model: nn.Module) -> None:
    """Raise `StepError` if a kernel of Liger's, which replaces the forward when training starts, would bypass one."""
    options = trainer.args.liger_kernel_config or {}
    if trainer.args.use_liger_kernel and options.get("fused_linear_cross_entropy", True):
        for path in _adapted_paths(model):
            raise StepError(
                f"use_liger_kernel=True multiplies by the weight of {path!r} itself, so what an adapter adds there "
                'would be ignored. Set liger_kernel_config={"fused_linear_cross_entropy": False}, or leave the head '
                f"out of targets, train_modules and bias, as exclude=({path!r},) does"
            )


def _refuse_unfit(trainer: "Trainer", model: nn.Module) -> None:
    """Raise `StepError` if the weight of an adapted head cannot be replaced for the time of a loss."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # listing plugins needs none of it

    for path, (_, slots) in zip(_adapted_paths(model), _adapted_heads(model), strict=True):
        deltas = [slot.method for slot in slots.applied if slot.adapter is not None]
        reason = None
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            reason = "that weight is divided among the processes"
        elif deltas and slots.base is not None and slots.base.packing is not None:
            reason = f"that weight is stored as {slots.base.packing.name}"
        elif lacking := [method for method in deltas if not hooks.has_delta(method)]:
            reason = f"method {lacking[0]!r} does not say what it adds to a weight"
        if reason is not None:
            raise StepError(
                f"the loss of {type(trainer).__name__} multiplies by the weight of {path!r} itself, and {reason}, so "
                "what an adapter adds there would be ignored. Leave the head out of targets, train_modules and bias, "
                f"as exclude=({path!r},) does, or train with a trainer that calls the head"
            )


def _warn_of_dropout(trainer: "Trainer", tuners: list[Tuner]) -> None:
    for path in _adapted_paths(tuners[0].model):
        dropped = [tuner.name for tuner in tuners if tuner.config.dropout and path in tuner.adapters()]
        if dropped:
            warn(
                f"dropout is not applied at {path!r}: the loss of {type(trainer).__name__} multiplies by its weight "
                f"itself, so adapter {dropped[0]!r} changes the weight and gets no input. Set dropout to 0, or exclude "
                "the head if that matters"
            )


def _refuse_computed(reference: nn.Module) -> None:
    """Raise `StepError` if TRL has run a model as reference in its constructor, whose head had adapters by then."""
    heads = _adapted_paths(reference)
    if heads and not all(map(adds_nothing, tuners_of(reference).values())):
        raise StepError(
            f"precompute_ref_log_probs has run the reference before tunerkit.attach, without the adapter of "
            f"{heads[0]!r}. Pass ref_model=tunerkit.reference(model), or set precompute_ref_log_probs=False"
        )


@contextmanager
def heads_shown(model: nn.Module) -> Iterator[None]:
    """Inside the block, adapted output heads have weights with the active adapters applied, and their hooks rest."""
    with ExitStack() as undo:
        torch.compiler.disable(_show_)(model, undo)
        yield


def _show_(model: nn.Module, undo: ExitStack) -> None:
    for head, slots in _adapted_heads(model):
        if not slots.enabled or slots.merged or not slots.active:
            continue
        own, shown = vars(head), _shown(head, slots)
        undo.callback(own.update, {name: own[name] for name in shown if name in own})
        undo.callback(_remove_, own, shown)
        undo.callback(setattr, slots, "enabled", True)
        slots.enabled = False
        own.update(shown)
        if (watched := vars(model).get(WATCHED)) is not None:
            watched.ran.update(_adapted_paths(model))  # it has an effect, although it is not called


def _shown(head: nn.Module, slots: Slots) -> dict[str, Any]:
    """The head's tensors as its active adapters change them, with gradients to what is trained."""
    for slot in slots.applied:
        if slot.copy is not None:  # it replaces the head, which nothing else adapts then
            return dict(slot.copy.named_parameters())
    with autocast_off(next(head.parameters()).device):  # as in a merge, and as in the adapter's own forward
        return adapted_tensors(type(head).__name__, head, slots)


def _remove_(attributes: dict[str, Any], names: dict[str, Any]) -> None:
    for name in names:
        attributes.pop(name, None)


def _adapted_heads(model: nn.Module) -> list[tuple[nn.Module, Slots]]:
    return [(head, slots) for head in named_heads(model) if (slots := slots_of(head)) is not None]


def _adapted_paths(model: nn.Module) -> list[str]:
    heads = [head for head, _ in _adapted_heads(model)]
    return [path for head in heads for path, module in base_modules(model) if module is head]


def _forward_of_trl(model: nn.Module) -> Any:
    """The forward by which TRL has replaced the model's, and which reads the weights of output heads; None if none."""
    run = vars(model).get("forward")
    while run is not None and not str(getattr(run, "__globals__", {}).get("__name__")).startswith("trl."):
        run = getattr(run, "__wrapped__", None)  # what others have wrapped it in
    return run


def _show_in_forward_(model: nn.Module) -> None:
    """Let a ``model.forward`` that TRL has replaced on the instance show the heads where it reads their weights.

    Each other call, such as the steps of a generation, calls the head: a dense weight would be slow there.
    """
    run: Any = model.forward
    if hasattr(run, _MARK):
        return
    has_switch = _FUSED in inspect.signature(_forward_of_trl(model), follow_wrapped=False).parameters
    is_bound = isinstance(run, MethodType)
    function: Callable[..., Any] = run.__func__ if is_bound else run

    @functools.wraps(function)  # `generate` reads the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (kwargs.get(_FUSED) if has_switch else _trains(kwargs)):
            return function(*args, **kwargs)
        with heads_shown(args[0] if is_bound else model):  # a deep copy binds the method to itself
            return function(*args, **kwargs)

    setattr(forward, _MARK, True)
    forward = torch.compiler.disable(forward, recursive=False)  # what it calls is compiled
    model.forward = MethodType(forward, model) if is_bound else forward


def _trains(inputs: Mapping[str, Any]) -> bool:
    """Whether a call is no step of a generation: then earlier versions of TRL read the weight, untold."""
    generates = inputs.get("use_cache") or inputs.get("past_key_values") is not None
    return inputs.get("labels") is not None or not generates


def _redirect(
    redirect: Callable[..., Any],
    models: list[nn.Module],
    wrapper: nn.Module,
    original: nn.Module,
    loss: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run ``loss`` in place of the forward of ``original``, as TRL's ``redirect`` does, with the heads shown."""

    def shown(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(heads_shown(model))
            return loss(*args, **kwargs)

    return redirect(wrapper, original, shown, *args, **kwargs)
