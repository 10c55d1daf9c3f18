"""Checks in lower precision: under autocast, and on a base in bf16 or fp16."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final
from unittest import SkipTest

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks, injection
from tunerkit.errors import PluginError, TunerkitError, shown
from tunerkit_testing.cases import STEPS, Trial, assert_base_untouched, optimizer_of
from tunerkit_testing.checks.probing import (
    Call,
    adapter_dtypes,
    calls_of,
    copy_parts,
    filled,
    gradients,
    movable,
    random_like,
    seeded,
    take_steps_,
    trained_parameters,
    values_of,
    without_copies,
)

_STEPS = 3
# By which share of a layer's largest output rounding to 16 bits may change it: 8 units in the last place. Under
# autocast a method's own products are rounded one after the other.
_SHARES: Final[Mapping[torch.dtype, float]] = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
_AUTOCAST, _GRADIENTS = 2.0**-5, 0.05
_NARROW = 4  # times that, where the adapter itself is in 16 bits: its own products are rounded one after the other


def check_autocast(trial: Trial) -> None:
    """Under bf16 autocast each layer's output is that in fp32 up to rounding, and the gradients are finite.

    At the start it is the base's, bit for bit, unless the method declares ``start="rounding"``.
    """
    model = filled(trial)
    with tunerkit.disabled(model), torch.autocast("cpu", torch.bfloat16):
        _calls(model, trial, "under autocast")
    for call in calls_of(model, trial):
        with torch.no_grad():
            expected = call.run()
            with torch.autocast("cpu", torch.bfloat16):
                found = call.run()
        worst, limit = float((found - expected).abs().max()), _AUTOCAST * float(expected.abs().max())
        assert worst <= limit, (
            f"{call.path}: under autocast the output differs by {worst:.3g} from that in fp32, allowed {limit:.3g}; "
            f"{_PLAIN}"
        )
    with torch.autocast("cpu", torch.bfloat16):
        loss = seeded(trial.loss, model)
    for name, gradient in gradients(loss, tunerkit.tuner(model)).items():
        assert bool(gradient.isfinite().all()), f"{name} has NaN or inf as its gradient under autocast"
    if hooks.registry.get(trial.method).start == "exact":
        _assert_starts_under_autocast(trial.wrapped().eval(), trial)


_PLAIN = (
    "compute in the dtype of the adapter's own parameters, inside `with tunerkit.plugin.autocast_off(x.device):`; "
    ".float() does not help, as autocast rounds the factors of each product"
)


@torch.no_grad()
def _assert_starts_under_autocast(model: nn.Module, trial: Trial) -> None:
    for call in calls_of(model, trial):
        with torch.autocast("cpu", torch.bfloat16):
            found = call.run()
            with tunerkit.disabled(model):
                expected = call.run()
        worst = float((found - expected).abs().max())
        assert torch.equal(found, expected), (
            f"{call.path}: under autocast the adapter changes the first output by {worst:.3g}, and without it by "
            f"nothing; {_PLAIN}"
        )


def _calls(model: nn.Module, trial: Trial, where: str) -> list[Call]:
    try:
        return calls_of(model, trial)
    except RuntimeError as error:
        raise SkipTest(f"the model itself does not run {where}: {shown(str(error))}") from error


def check_half_precision(trial: Trial) -> None:
    """On bases in bf16 and fp16, each layer's output and gradients are those in fp64, up to rounding.

    So is its output with adapters in bf16 and fp16, on a base in fp32, computed by forward and by the delta. With these
    it is finite at the start too, in both modes.
    """
    for dtype in _SHARES:
        narrow = trial.in_dtype(dtype)
        wide = narrow.in_fp64()
        model, exact = filled(narrow), filled(wide)
        copy_parts(model, exact)
        share = max(_SHARES.get(each, 0.0) for each in (dtype, *adapter_dtypes(model)))
        own, theirs = trained_parameters(tunerkit.tuner(model)), trained_parameters(tunerkit.tuner(exact))
        twins = {call.path: call for call in calls_of(exact, wide)}
        for call in _calls(model, narrow, f"in {dtype}"):
            if call.base.lends:  # its output is computed from merged weights
                continue
            found = _found(call, own)
            expected = _found(twins[call.path].with_input(_widened(call.x)), theirs)
            _assert_near(f"{call.path}: on a base in {dtype}", call.path, share, found, expected)
    _assert_narrow_adapters(trial)


@torch.no_grad()
def _assert_narrow_adapters(trial: Trial) -> None:
    wide = trial.in_fp64()
    exact = filled(wide)
    twins = {call.path: call for call in calls_of(exact, wide)}
    for dtype, share in _SHARES.items():
        own = trial.but(adapter_dtype=str(dtype).removeprefix("torch."))
        try:
            model = filled(own)
        except TunerkitError:
            continue  # refused in words
        _assert_starts_finite(own.wrapped().eval(), own, dtype)
        copy_parts(model, exact)
        for call in calls_of(model, trial):
            found, expected = (_computed(each, root) for each, root in ((call, model), (twins[call.path], exact)))
            _assert_near(f"{call.path}: with adapters in {dtype}", call.path, _NARROW * share, found, expected)


def _assert_starts_finite(model: nn.Module, trial: Trial, dtype: torch.dtype) -> None:
    calls = calls_of(model, trial)
    for mode in (False, True):
        model.train(mode)
        for call in calls:
            assert bool(call.seeded().isfinite().all()), (
                f"{call.path}: with adapters in {dtype}, the first output is NaN or inf in places, in "
                f"{'training' if mode else 'eval'} mode; below 6e-8 numbers are 0 in fp16, such as a guard of 1e-8 in "
                "a quotient, or a start that small: divide in fp32, as after self.a.float()"
            )


def _computed(call: Call, model: nn.Module) -> dict[str, Tensor]:
    """Return a layer's output as forward computes it, and with the delta in its place."""
    found = {} if call.base.lends else {_OUTPUT: call.run().double()}
    if call.base.has_weight and hooks.has_delta(call.slot.method):
        with suppress(PluginError):  # such as one of another shape
            tensors = injection.adapted_tensors(call.path, call.module, call.slots)
            with tunerkit.disabled(model):
                found[f"{_OUTPUT} with the delta"] = call.run(tensors).double()
    return found


def _widened(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _found(call: Call, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the output, and the gradients of a weighted sum of it, in fp64."""
    call, moved = movable(call, own)
    output = call.seeded()
    total = (output.double() * random_like(output)).sum()
    if not total.requires_grad:
        return {_OUTPUT: output.double()}
    given = torch.autograd.grad(total, [*moved.values()], allow_unused=True, materialize_grads=True)
    return {_OUTPUT: output.detach().double(), **{name: g.double() for name, g in zip(moved, given, strict=True)}}


_OUTPUT = "the output"


def _assert_near(
    where: str, path: str, share: float, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    hint = (
        "compute in the dtype of the adapter's own parameters, as x.to(self.a.dtype), and cast the sum to y.dtype; "
        "16 bits have few digits, and fp16 ends at 65504"
    )
    for name, right in expected.items():
        what, error = name.removeprefix(f"{path}: "), found[name] - right
        assert bool(found[name].isfinite().all()) or not bool(right.isfinite().all()), (
            f"{where}, {what} is NaN or inf in places; {hint}"
        )
        if name.startswith(_OUTPUT):
            worst, limit = float(error.abs().max()), share * float(right.abs().max())
        else:
            what = f"the gradient for {what}"
            worst, limit = float(error.norm()), _GRADIENTS * float(right.norm())
        assert worst <= limit, f"{where}, {what} differs by {worst:.3g} from that in fp64, allowed {limit:.3g}; {hint}"


def check_bf16_base(trial: Trial) -> None:
    """On a base in bf16 the adapter stays in the dtype of its config, trains, and leaves the base alone."""
    narrow = trial.in_dtype(torch.bfloat16)
    model = without_copies(narrow)
    tuner = tunerkit.tuner(model)
    own = trained_parameters(tuner)
    (dtype,) = adapter_dtypes(model)
    starts = values_of(own)
    optimizer = optimizer_of(own.values(), trial.lr)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    take_steps_(model, narrow, optimizer, range(_STEPS))
    for name, parameter in trained_parameters(tuner).items():
        assert parameter.dtype == dtype, f"{name} is {parameter.dtype} instead of {dtype}; do not cast it to the base's"
        assert bool(parameter.isfinite().all()), f"{name} contains NaN or inf after {_STEPS} steps on a base in bf16"
    moved = any(not torch.equal(parameter, starts[name]) for name, parameter in own.items())
    assert moved, "no parameter moved on a base in bf16; compute the adapter's part in its own dtype"
    assert_base_untouched(model, narrow.case)
