"""Apply adapters of output heads in losses that multiply by the head's weight directly, as TRL's do."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import tunerkit
from tunerkit.errors import StepError, warn
from tunerkit.plugin import Tuner, autocast_off
from tunerkit.plugin.trainers import Slots, adapted_tensors, adds_nothing, has_delta, inside, note_used, walk
from tunerkit_transformers.new_modules import named_heads

if TYPE_CHECKING:
    from transformers import Trainer

_MARK = "_tunerkit_shows_heads"
_FUSED = "fused_lm_head"  # the argument by which a forward that TRL has replaced multiplies by the weight itself
_REDIRECTION = "_forward_redirection"  # with which TRL runs a loss of its own in place of a model's forward


def refuse_heads(trainer: Any, tuners: list[Tuner]) -> None:
    """Raise `StepError` if a loss reads an adapted head's weight, and the adapted weight cannot take its place.

    The loss would ignore the head's adapters and not train them. Nothing is changed.
    """
    models = _read_models(trainer, tuners)
    for model in models:
        _refuse_unfit(trainer, model)
    if models and vars(trainer.args).get("precompute_ref_log_probs"):
        held = vars(trainer).get("ref_model")
        _refuse_computed(tuners[0].model if held is None else inside(held))


def settle_heads_(trainer: Any, tuners: list[Tuner]) -> None:
    """Override the weights of adapted output heads by the adapted weights while a loss reads them.

    This covers the trained model, a reference and a teacher. Nothing changes without an adapted head, or if the
    trainer calls the head, as `CPOTrainer` does.
    """
    models = _read_models(trainer, tuners)
    for model in filter(forward_of_trl, models):
        _show_in_forward_(model)
    if tuners[0].model in models:
        _warn_of_dropout(trainer, tuners)
    redirect = vars(trainer).get(_REDIRECTION)
    if models and redirect is not None:
        setattr(trainer, _REDIRECTION, functools.partial(_redirect, getattr(redirect, "args", [redirect])[0], models))


def _read_models(trainer: Any, tuners: list[Tuner]) -> list[nn.Module]:
    """Return the models with adapted output heads whose weights the trainer's loss reads directly."""
    others = [vars(trainer).get(name) for name in ("ref_model", "teacher_model")]
    every = (tuners[0].model, *map(inside, filter(None, others)))
    redirects = vars(trainer).get(_REDIRECTION) is not None
    return [model for model in every if _adapted_heads(model) and (redirects or forward_of_trl(model) is not None)]


def refuse_liger(trainer: "Trainer", model: nn.Module) -> None:
    """Raise `StepError` if a Liger kernel, which replaces the forward once training starts, would bypass an adapter."""
    options = trainer.args.liger_kernel_config or {}
    if trainer.args.use_liger_kernel and options.get("fused_linear_cross_entropy", True):
        for path, _, _ in _adapted_heads(model):
            raise StepError(
                f"use_liger_kernel=True multiplies by the weight of {path!r} itself, so what an adapter adds there "
                'would be ignored. Set liger_kernel_config={"fused_linear_cross_entropy": False}, or leave the head '
                f"out of targets, train_modules and bias, as exclude=({path!r},) does"
            )


def _refuse_unfit(trainer: "Trainer", model: nn.Module) -> None:
    """Raise `StepError` if the weight of an adapted head cannot be overridden during a loss."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # listing plugins needs none of it

    for path, _, slots in _adapted_heads(model):
        deltas = [slot.method for slot in slots.applied if slot.adapter is not None]
        reason = None
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            reason = "that weight is divided among the processes"
        elif deltas and slots.base is not None and slots.base.packing is not None:
            reason = f"that weight is stored as {slots.base.packing.name}"
        elif lacking := [method for method in deltas if not has_delta(method)]:
            reason = f"method {lacking[0]!r} implements neither tunerkit_delta nor tunerkit_factors"
        if reason is not None:
            raise StepError(
                f"the loss of {type(trainer).__name__} multiplies by the weight of {path!r} itself, and {reason}, so "
                "what an adapter adds there would be ignored. Leave the head out of targets, train_modules and bias, "
                f"as exclude=({path!r},) does, or train with a trainer that calls the head"
            )


def _warn_of_dropout(trainer: "Trainer", tuners: list[Tuner]) -> None:
    for path, _, _ in _adapted_heads(tuners[0].model):
        dropped = [tuner.name for tuner in tuners if tuner.config.dropout and path in tuner.adapters()]
        if dropped:
            warn(
                f"dropout is not applied at {path!r}: the loss of {type(trainer).__name__} multiplies by its weight "
                f"itself, so adapter {dropped[0]!r} changes the weight and gets no input. Set dropout to 0, or exclude "
                "the head if that matters"
            )


def _refuse_computed(reference: nn.Module) -> None:
    """Raise `StepError` if the trainer's constructor ran a reference with an adapted head, before the override."""
    heads = _adapted_heads(reference)
    if heads and not all(map(adds_nothing, tunerkit.adapters(reference).values())):
        raise StepError(
            f"precompute_ref_log_probs has run the reference before tunerkit.attach, without the adapter of "
            f"{heads[0][0]!r}. Pass ref_model=tunerkit.reference(model), or set precompute_ref_log_probs=False"
        )


@contextmanager
def heads_shown(model: nn.Module) -> Iterator[None]:
    """Inside the block, output heads have the adapted weights, and their forward hooks add nothing."""
    with ExitStack() as undo:
        torch.compiler.disable(_show_)(model, undo)
        yield


def _show_(model: nn.Module, undo: ExitStack) -> None:
    heads = _adapted_heads(model)
    for _, head, slots in heads:
        if not slots.enabled or slots.merged or not slots.active:
            continue
        own, shown = vars(head), _shown(head, slots)
        undo.callback(own.update, {name: own[name] for name in shown if name in own})
        undo.callback(_remove_, own, shown)
        undo.callback(setattr, slots, "enabled", True)
        slots.enabled = False
        own.update(shown)
        note_used(model, (path for path, _, _ in heads))


def _shown(head: nn.Module, slots: Slots) -> dict[str, Any]:
    """Return the head's tensors with its active adapters applied; gradients reach the trained parameters."""
    for slot in slots.applied:
        if slot.copy is not None:  # it replaces the head, which nothing else adapts then
            return dict(slot.copy.named_parameters())
    with autocast_off(next(head.parameters()).device):  # as in a merge, and as in the adapter's own forward
        return adapted_tensors(type(head).__name__, head, slots)


def _remove_(attributes: dict[str, Any], names: dict[str, Any]) -> None:
    for name in names:
        attributes.pop(name, None)


def _adapted_heads(model: nn.Module) -> list[tuple[str, nn.Module, Slots]]:
    """Return (path, head, slots) of a model's adapted output heads."""
    heads = set(map(id, named_heads(model)))
    return [found for found in walk(model) if id(found[1]) in heads] if heads else []


def forward_of_trl(model: nn.Module) -> Any:
    """Return TRL's replacement of the model's forward, which reads output heads' weights; None if there is none."""
    run = vars(model).get("forward")
    while run is not None and not str(getattr(run, "__globals__", {}).get("__name__")).startswith("trl."):
        run = getattr(run, "__wrapped__", None)  # below other wrappers
    return run


def around_forward_(model: nn.Module, mark: str, call: Callable[..., Any]) -> None:
    """Replace ``model.forward`` by a wrapper that returns ``call(run, model, args, kwargs)``.

    ``run`` is the earlier forward, bound to the model. The attribute ``mark`` prevents a second wrapper.
    """
    run: Any = model.forward
    if hasattr(run, mark):
        return
    is_bound = isinstance(run, MethodType)
    function: Callable[..., Any] = run.__func__ if is_bound else run

    @functools.wraps(function)  # `generate` reads the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not is_bound:
            return call(function, model, args, kwargs)
        return call(functools.partial(function, args[0]), args[0], args[1:], kwargs)  # a deep copy binds it to itself

    setattr(forward, mark, True)
    forward = torch.compiler.disable(forward, recursive=False)  # only this function: its callees are compiled
    model.forward = MethodType(forward, model) if is_bound else forward


def _show_in_forward_(model: nn.Module) -> None:
    """Make the calls of TRL's ``model.forward`` that read the weight of an output head run inside `heads_shown`.

    All other calls, such as the steps of a generation, call the head itself, and run as before, since that is faster.
    """
    has_switch = _FUSED in inspect.signature(forward_of_trl(model), follow_wrapped=False).parameters

    def show(run: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (kwargs.get(_FUSED) if has_switch else _trains(kwargs)):
            return run(*args, **kwargs)
        with heads_shown(model):
            return run(*args, **kwargs)

    around_forward_(model, _MARK, show)


def _trains(inputs: Mapping[str, Any]) -> bool:
    """Whether a call is not a generation step: in all such calls, earlier versions of TRL read the head's weight."""
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
    """Show the trained heads, and let TRL's ``redirect`` run ``loss`` as the forward of ``original``."""

    def shown(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(heads_shown(model))
            return loss(*args, **kwargs)

    return redirect(wrapper, original, shown, *args, **kwargs)
