"""Checks of gradients, target by target: they are true, and forward and delta have them for the same tensors."""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

import tunerkit
from tunerkit import hooks
from tunerkit_testing.cases import Trial
from tunerkit_testing.checks.probing import (
    Call,
    calls_of,
    filled,
    movable,
    random_like,
    require_delta,
    some,
    trained_parameters,
)

_STEPS = (3e-3, 1e-6)  # for adapters that compute in fp32, and for those with kinks, such as a ReLU
_SHARE = 1e-2  # of the gradient's norm


@attrs.frozen
class Reached:
    """Names of the tensors that a result depends on.

    Attributes:
        connected: Those that the result was computed from, with gradients.
        moved: Those whose gradient is not 0.
    """

    connected: set[str]
    moved: set[str]


def check_gradients_are_true(trial: Trial) -> None:
    """In fp64, each gradient is the slope of the layer's output, which is measured by moving the tensor a little.

    The layer's input is moved too: the adapters before it are trained through it.
    """
    wide = trial.in_fp64()
    model = filled(wide)
    own = trained_parameters(tunerkit.tuner(model))
    for noted in calls_of(model, wide):
        call, moved = movable(noted, own)
        call.adapter.train()
        output = call.seeded()
        if not output.requires_grad:
            continue
        weights = random_like(output)
        found = torch.autograd.grad(
            (output * weights).sum(), list(moved.values()), allow_unused=True, materialize_grads=True
        )
        rounding = 1e-4 * float(output.detach().norm())
        for (name, tensor), gradient in zip(moved.items(), found, strict=True):
            direction = random_like(tensor)
            claimed = float((gradient * direction).sum())
            slopes = [float((_difference(call, tensor, s * direction) * weights).sum()) / (2 * s) for s in _STEPS]
            _, slope = min((abs(each - claimed), each) for each in slopes)
            assert abs(slope - claimed) <= _SHARE * max(float(gradient.norm()), abs(slope)) + rounding, (
                f"{call.path}: as {name.removeprefix(f'{call.path}: ')} moves in a random direction, a weighted sum of "
                f"the outputs changes at a rate of {slope:.4g}, and the gradient says {claimed:.4g}; in forward, "
                "detach nothing that is computed from a parameter or from x, and check any torch.autograd.Function of "
                "your own. If the method detaches on purpose, as DoRA does with the norm, name this check in "
                "expected_failures"
            )


@torch.no_grad()
def _difference(call: Call, tensor: Tensor, change: Tensor) -> Tensor:
    """Return the output with a change added to a tensor, minus the output with the change subtracted."""
    before = tensor.clone()
    tensor.add_(change)
    above = call.seeded()
    tensor.copy_(before - change)
    below = call.seeded()
    tensor.copy_(before)
    return above - below


def check_delta_gives_gradients(trial: Trial) -> None:
    """At each target, forward and delta have gradients for the same trained tensors, also for those that are shared."""
    require_delta(trial.method)
    model = filled(trial)
    own = trained_parameters(tunerkit.tuner(model))
    for call in calls_of(model, trial):
        if call.base.lends or not call.base.has_weight:  # its output is computed from the delta, or there is none
            continue
        delta = hooks.delta(call.path, trial.method, call.adapter.train(), call.base)
        assert call.adapter.training, (
            f"{call.path}: the delta's hook leaves the adapter in eval mode; call no eval() there"
        )
        delta = hooks.delta(call.path, trial.method, call.adapter.eval(), call.base)
        by_delta = _reached([part for part in (delta.weight, delta.bias) if part is not None], own)
        by_forward = _reached([call.run()], own)
        lost = by_forward.moved - by_delta.moved
        assert not lost, (
            f"{call.path}: forward trains {_listed(lost, call.path)}, and the delta has no gradient for it; compute "
            "tunerkit_delta or tunerkit_factors from the parameters, without detach(), .data or no_grad(): where a "
            "layer's weight is used directly, as in attention, only the delta trains the adapter"
        )
        lost = by_delta.moved - by_forward.connected
        assert not lost, (
            f"{call.path}: the delta depends on {_listed(lost, call.path)}, and forward has no gradient for it at "
            "this target; compute forward from every parameter at each target, without detaching it"
        )


def _reached(results: Sequence[Tensor], own: Mapping[str, Tensor]) -> Reached:
    total = sum((part.double() * random_like(part)).sum() for part in results)
    if not isinstance(total, Tensor) or not total.requires_grad:
        return Reached(set(), set())
    found: Sequence[Tensor | None] = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    connected = {name: gradient for name, gradient in zip(own, found, strict=True) if gradient is not None}
    return Reached(set(connected), {name for name, gradient in connected.items() if bool(gradient.count_nonzero())})


def _listed(names: set[str], path: str) -> str:
    return some(sorted(name.removeprefix(f"{path}: ") for name in names))
