"""Calibrate: measure the data at the targets before training, from which a method sets its start and its ranks."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from tunerkit import hooks, injection, steps
from tunerkit.errors import AdapterError
from tunerkit.injection import Tuner, slots_in

M = TypeVar("M", bound=nn.Module)
# Of fitting a new head on frozen features, which is a convex problem for a linear one.
_PASSES, _LR = 3, 5e-3


def calibrate(model: M, batches: Iterable[Any], adapter: str | None = None, *, loss: injection.Loss | None = None) -> M:
    """Run a model on data before training, and let an adapter's method set its start and its ranks from that.

    The method says what it wants to know, see `tunerkit.StatisticsRequest`. Statistics are summed up over the batches,
    so any amount of data takes the same memory. The base model and the caller's random state do not change.

    If the method wants gradients, modules that are trained in full are fitted to the batches first, because the
    gradients behind a new head say nothing. Embeddings are not fitted: most of their rows are pretrained.

    Args:
        model: The wrapped model. Call this after `wrap` and before `attach`.
        batches: Mappings of keyword arguments, tuples or lists of arguments, or single arguments of the model; on the
            model's device. If a new head must be fitted, they are gone through several times: pass a list or a loader.
        adapter: The adapter's name. It may be left out if the model has only one.
        loss: Computes the loss from the model's output and the batch. By default it is the output's ``loss``, or the
            output itself if that is one number. Only methods that want gradients need it.

    Returns:
        The same object.

    Raises:
        AdapterError: The method does not calibrate; training has begun; the model is merged, disabled or runs in a
            process group; there is no batch; a batch gives no loss or NaN; or a target never ran.
        PluginError: The method's plugin violates the contract of the hook.
    """
    tuner = injection.tuner(model, adapter)
    request = hooks.registry.get(tuner.method).statistics
    if request is None:
        raise AdapterError(f"method {tuner.method!r} does not calibrate; {_known()}. Train it as it is")
    _refuse_started(tuner)
    injection.refuse_fixed(tuner.model, "calibrating")
    if isinstance(batches, Mapping | torch.Tensor | str):
        raise AdapterError(f"batches is one {type(batches).__name__}; pass a list of batches")
    with (
        injection.evaluating(tuner.model),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        if request.gradients:
            _fit_heads_(tuner, batches, loss)
        found, count = injection.measure(tuner, request, batches, loss)
        with torch.no_grad():
            ranks = hooks.calibrate(tuner, found)
    tuner.progress.calibration = {"batches": count, "rows": max(each.rows for each in found.values())}
    injection.record(tuner, ranks)
    return model


def _known() -> str:
    """Which methods calibrate, for a message."""
    listed = hooks.registry.methods().items()
    able = [name for name, info in listed if info.error is None and hooks.registry.get(name).statistics is not None]
    return f"methods that do: {', '.join(able)}" if able else "no installed method does"


def _refuse_started(tuner: Tuner) -> None:
    # What a method adds at its start tells whether a loop that nobody attached has trained the adapter.
    starts_at_0 = hooks.registry.get(tuner.method).start == "exact" and hooks.has_delta(tuner.method)
    states = {
        "loaded from a file": tuner.progress.loaded,
        "trained": tuner.steps > 0 or (starts_at_0 and not injection.adds_nothing(tuner)),
        "attached to an optimizer": steps.is_attached(tuner),
    }
    for state, holds in states.items():
        if holds:
            raise AdapterError(
                f"adapter {tuner.name!r} is already {state}, and calibrating would overwrite it: calibrate right after "
                "tunerkit.wrap"
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise AdapterError(
            "calibrating in a process group would give each process another start; calibrate in one process, save the "
            "adapter, and load it with trainable=True in all"
        )


def _fit_heads_(tuner: Tuner, batches: Iterable[Any], loss: injection.Loss | None) -> None:
    """Train the possible new heads, and nothing else, on the batches. If that fails, their values are restored."""
    copies = [slot.copy for _, slot in slots_in(tuner) if slot.copy is not None]
    heads = [copy for copy in copies if not any(isinstance(part, nn.Embedding) for part in copy.modules())]
    if heads and isinstance(batches, Iterator):
        raise AdapterError(
            "a new head must be fitted before gradients mean anything, which goes through the batches several times, "
            f"and a {type(batches).__name__} can be gone through once; pass a list or a loader"
        )
    trained = [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]
    if not trained:
        return
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=_LR)
    try:
        for _ in range(_PASSES):
            for batch in batches:
                value = injection.loss_of(tuner.model, batch, loss)
                gradients = torch.autograd.grad(value, trained, allow_unused=True)
                for parameter, grad in zip(trained, gradients, strict=True):
                    parameter.grad = grad
                optimizer.step()
    except BaseException:
        for parameter, values in zip(trained, before, strict=True):
            parameter.data.copy_(values)
        raise
    finally:
        optimizer.zero_grad()
