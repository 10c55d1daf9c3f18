"""Calibrating: before training, data set the start and the ranks of an adapter."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.plugin import (
    AdapterError,
    BaseLayer,
    Statistics,
    StatisticsRequest,
    Tuner,
    fit_start_,
    method_record,
)
from tunerkit_verbs.statistics import Loss, loss_of, measure

M = TypeVar("M", bound=nn.Module)
# Of fitting a new head on frozen features, which is a convex problem for a linear one.
_PASSES: Final = 3
_LR: Final = 5e-3


def calibrate(model: M, batches: Iterable[Any], adapter: str | None = None, *, loss: Loss | None = None) -> M:
    """Run a model on data before training, and let an adapter's method set its start and its ranks from that.

    The method says what it wants to know, see `tunerkit.plugin.StatisticsRequest`. Statistics are summed up over the
    batches, so any amount of data takes the same memory. The base model and the caller's random state do not change.

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
    tuner = tunerkit.tuner(model, adapter)
    if method_record(tuner.method).statistics is None:
        listed = tunerkit.methods().items()
        able = [name for name, info in listed if info.error is None and method_record(name).statistics is not None]
        known = f"methods that do: {', '.join(able)}" if able else "no installed method does"
        raise AdapterError(f"method {tuner.method!r} does not calibrate; {known}. Train it as it is")

    def measured(request: StatisticsRequest, bases: Mapping[str, BaseLayer]) -> tuple[Mapping[str, Statistics], int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise AdapterError(
                "calibrating in a process group would give each process another start; calibrate in one process, save "
                "the adapter, and load it with trainable=True in all"
            )
        if isinstance(batches, Mapping | Tensor | str):
            raise AdapterError(f"batches is one {type(batches).__name__}; pass a list of batches")
        if request.gradients:
            _fit_heads_(tuner, batches, loss)
        return measure(tuner, request, bases, batches, loss)

    fit_start_(tuner, measured)
    return model


def _fit_heads_(tuner: Tuner, batches: Iterable[Any], loss: Loss | None) -> None:
    """Train the possible new heads, and nothing else, on the batches. If that fails, their values are restored."""
    heads = [
        f"{each.path}.copy.".removeprefix(".")
        for each in tuner.copies
        if not any(isinstance(part, nn.Embedding) for part in each.module.modules())
    ]
    if heads and isinstance(batches, Iterator):
        raise AdapterError(
            "a new head must be fitted before gradients mean anything, which goes through the batches several times, "
            f"and a {type(batches).__name__} can be gone through once; pass a list or a loader"
        )
    own = tuner.named_parameters()
    trained = [parameter for name, parameter in own if name.startswith(tuple(heads)) and parameter.requires_grad]
    if not trained:
        return
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=_LR)
    try:
        for _ in range(_PASSES):
            for batch in batches:
                value = loss_of(tuner.model, batch, loss)
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
