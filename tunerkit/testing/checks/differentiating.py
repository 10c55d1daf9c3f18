"""A check that forward and delta train the same tensors, target by target."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

import tunerkit
from tunerkit import hooks
from tunerkit.testing.cases import Case
from tunerkit.testing.checks.probing import calls_of, filled, require_delta, trained_parameters


@attrs.frozen
class Reached:
    """Names of the tensors that a result depends on.

    Attributes:
        connected: Those that the result was computed from, with gradients.
        moved: Those whose gradient is not 0.
    """

    connected: set[str]
    moved: set[str]


def check_delta_gives_gradients(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """At each target, forward and delta have gradients for the same trained tensors, also for those that are shared."""
    require_delta(method)
    model = filled(case, method, config)
    own = trained_parameters(tunerkit.tuner(model))
    for call in calls_of(model, case):
        if call.base.lends or not call.base.has_weight:  # its output is computed from the delta, or there is none
            continue
        delta = hooks.delta(call.path, method, call.adapter, call.base)
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
    generator = torch.Generator().manual_seed(5)
    total = sum(
        (part.double() * torch.randn(part.shape, dtype=torch.float64, generator=generator)).sum() for part in results
    )
    if not isinstance(total, Tensor) or not total.requires_grad:
        return Reached(set(), set())
    found: Sequence[Tensor | None] = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    connected = {name: gradient for name, gradient in zip(own, found, strict=True) if gradient is not None}
    return Reached(set(connected), {name for name, gradient in connected.items() if bool(gradient.count_nonzero())})


def _listed(names: set[str], path: str) -> str:
    listed = sorted(name.removeprefix(f"{path}: ") for name in names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
