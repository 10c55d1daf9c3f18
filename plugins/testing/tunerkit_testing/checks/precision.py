"""Checks in lower precision: under autocast, and on a base in bf16."""

from collections.abc import Mapping
from pathlib import Path

import torch

import tunerkit
from tunerkit_testing.cases import STEPS, Case, assert_base_untouched
from tunerkit_testing.checks.probing import (
    adapter_dtypes,
    filled,
    gradients,
    in_dtype,
    seeded,
    trained_parameters,
    without_copies,
)

_STEPS = 3
# How much further from fp32 the adapted model may be than the base under autocast, and by which share of the output.
_TIMES, _SHARE = 10, 0.05


def check_autocast(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Under bf16 autocast the output is that in fp32 up to rounding, and the gradients are finite."""
    model = filled(case, method, config)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.output(model)
        loss = seeded(case.loss, model)
    expected = case.output(model)
    with tunerkit.disabled(model):
        base = case.output(model)
        with torch.autocast("cpu", torch.bfloat16):
            rounding = float((case.output(model) - base).abs().max())
    worst = float((found - expected).abs().max())
    assert worst <= _TIMES * rounding + _SHARE * float(expected.abs().max()), (
        f"under autocast the output differs by {worst:.3g} from that in fp32, the base's by {rounding:.3g}; compute "
        "in the dtype of the adapter's own parameters, with autocast off"
    )
    for name, gradient in gradients(loss, tunerkit.tuner(model)).items():
        assert bool(gradient.isfinite().all()), f"{name} has NaN or inf as its gradient under autocast"


def check_bf16_base(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """On a base in bf16 the adapter stays in the dtype of its config, trains, and leaves the base alone."""
    narrow = in_dtype(case, torch.bfloat16)
    model = without_copies(narrow, method, config)
    tuner = tunerkit.tuner(model)
    own = trained_parameters(tuner)
    (dtype,) = adapter_dtypes(model)
    starts = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=case.lr)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    for step in range(_STEPS):
        seeded(narrow.loss, model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in trained_parameters(tuner).items():
        assert parameter.dtype == dtype, f"{name} is {parameter.dtype} instead of {dtype}; do not cast it to the base's"
        assert bool(parameter.isfinite().all()), f"{name} contains NaN or inf after {_STEPS} steps on a base in bf16"
    moved = any(not torch.equal(parameter, starts[name]) for name, parameter in own.items())
    assert moved, "no parameter moved on a base in bf16; compute the adapter's part in its own dtype"
    assert_base_untouched(model, narrow)
