"""Checks of a wrapped model before training: it is the base model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import tunerkit
from tunerkit import hooks
from tunerkit_testing.cases import Case, assert_base_untouched, assert_same, wrapped
from tunerkit_testing.checks.probing import adapter_dtypes, base_output, in_dtype, one_code_path


def check_building_keeps_the_base(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """`wrap` returns the same object and keeps every name, type and value of the base."""
    model = case.build()
    assert tunerkit.wrap(model, method, {**case.settings, **config}, seed=0) is model
    assert_base_untouched(model, case, "only read the base layer in tunerkit_build_adapter, do not write to it")


@one_code_path()
def check_start(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """The first output is bit-identical to the base's; within rounding if the method declares ``start="rounding"``."""
    assert_start(wrapped(case, method, config).eval(), case)


def assert_start(model: nn.Module, case: Case) -> None:
    """Assert that the output of a wrapped model is what its method declares of the start; it is frozen for that."""
    found, expected = case.output(model.requires_grad_(False)), base_output(case)
    hint = "choose initial values with which the adapter adds nothing, such as a factor of 0"
    if hooks.registry.get(tunerkit.tuner(model).method).start == "rounding":
        assert_same(found, expected, "the start against the base", hint, adapters=adapter_dtypes(model))
        return
    worst = float((found - expected).abs().max())
    assert torch.equal(found, expected), (
        f"the adapter changes the first output by {worst:.3g}; {hint}, or declare Method(..., start='rounding') if the "
        "difference is rounding alone"
    )


def check_seed(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """The same seed gives the same adapter, also on a base of another dtype, whatever was drawn before."""
    first = wrapped(case, method, config)
    torch.rand(3)
    assert_same_start(first, wrapped(case, method, config), "drawn twice with one seed")
    adapters = tunerkit.tuner(first).adapters().values()
    if any(adapter.reads_weight for adapter in adapters):
        return  # the start may depend on the weight, which is rounded
    other = wrapped(in_dtype(case, torch.bfloat16), method, config)
    assert_same_start(first, other, "on a base in bfloat16 (if it depends on the weight, set reads_weight = True)")


def assert_same_start(one: nn.Module, other: nn.Module, what: str) -> None:
    """Assert that two models have the same adapters, bit for bit."""
    found = dict(tunerkit.tuner(other).adapters())
    for path, adapter in tunerkit.tuner(one).adapters().items():
        twin = found[path].state_dict()
        for name, tensor in adapter.state_dict().items():
            assert torch.equal(tensor, twin[name]), (
                f"{path}: {name} differs {what}; build it on the CPU in the default dtype, from torch's random state"
            )
