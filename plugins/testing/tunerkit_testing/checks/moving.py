"""Checks of copies and moves: deep copies, pickles, and weights that accelerate keeps elsewhere."""

import copy
import pickle
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import attrs
import torch
from torch import Tensor

import tunerkit
from tunerkit.errors import TargetError, shown
from tunerkit_testing.cases import Case, assert_same, trained, wrapped
from tunerkit_testing.checks.probing import fill_, filled, in_dtype, trained_parameters, with_inputs

_DEVICES = 1e-3  # another device sums up in another order, and may multiply in a lower precision


def check_deepcopy(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """A deep copy of a trained model computes the same, and its adapters are its own."""
    model = trained(case, method, config)
    before = case.output(model)
    twin = copy.deepcopy(model)
    assert torch.equal(case.output(twin), before), "a deep copy computes something else; " + _OWN
    fill_(twin)
    assert torch.equal(case.output(model), before), "training a deep copy changes the original; " + _OWN
    assert not torch.equal(case.output(twin), before), "a deep copy does not use its own parameters; " + _OWN


_OWN = "hold tensors only as parameters and buffers of the adapter, not in closures, lists or the plugin"


def check_pickle(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Every adapter survives pickle, as spawned workers and torch.save need it."""
    tuner = tunerkit.tuner(filled(case, method, config))
    for path, adapter in tuner.adapters().items():
        try:
            again = pickle.loads(pickle.dumps(adapter))
        except Exception as error:
            raise AssertionError(
                f"{path}: the adapter cannot be pickled: {shown(str(error))}; hold no lambda, local class, lock or "
                "open file in it, and define its class at the top of a module"
            ) from error
        twin = again.state_dict()
        for name, tensor in adapter.state_dict().items():
            assert torch.equal(twin[name], tensor), (
                f"{path}: {name} is another after pickling; do not override __reduce__"
            )


def check_offload(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """On a base whose weights accelerate loads for each forward, the output is the same, and the adapter trains."""
    if find_spec("accelerate") is None:
        raise SkipTest("accelerate is not installed")
    if find_spec("tunerkit_distributed") is None:
        raise SkipTest("tunerkit-distributed, which knows how accelerate holds weights, is not installed")
    cpu_offload = import_module("accelerate").cpu_offload

    # In fp64: loaded weights may lie in memory as other kernels read them, and deep models amplify fp32 rounding.
    case, config = in_dtype(case, torch.float64), {**config, "adapter_dtype": "float64"}
    expected = filled(case, method, config)
    away = cpu_offload(case.build().eval(), execution_device=torch.device("cpu"))
    try:
        case.output(away)
    except Exception as error:
        raise SkipTest(f"the model itself does not run while it is offloaded: {shown(str(error))}") from error
    try:
        tunerkit.wrap(away, method, {**case.settings, **config}, seed=0)
    except TargetError as error:
        raise SkipTest(f"this model cannot be adapted while it is offloaded: {error}") from error
    fill_(away).eval()
    hint = "read the weight as base.dense() or base.matrix(), and build parameters from in_features and out_features"
    assert_same(case.output(away), case.output(expected), "offloaded against in memory", hint, adapters=[torch.float32])
    case.loss(away).backward()
    own = trained_parameters(tunerkit.tuner(away))
    meta = [name for name, parameter in own.items() if parameter.is_meta]
    assert not meta, f"{meta[0]} is on the meta device: it would not be trained; {hint}"
    assert any(parameter.grad is not None for parameter in own.values()), f"no parameter has a gradient; {hint}"


def check_device(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """On an accelerator, moved there or wrapped there, the model has the output that it has on the CPU."""
    if not torch.accelerator.is_available():
        raise SkipTest("there is no accelerator")
    device = torch.accelerator.current_accelerator()
    model = filled(case, method, config)
    expected, start = case.output(model), case.output(wrapped(case, method, config).eval())
    hint = "keep tensors in parameters and buffers, and build new ones on the device of x"
    moved = with_inputs(model.to(device), lambda x: x.to(device))
    _assert_near(case.output(moved), expected, f"moved to {device}; {hint}")
    there = attrs.evolve(case, build=lambda: with_inputs(case.build().to(device), lambda x: x.to(device)))
    _assert_near(case.output(wrapped(there, method, config).eval()), start, f"wrapped on {device}; {hint}")


def _assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    worst, largest = float((found.cpu() - expected).abs().max()), float(expected.abs().max())
    assert worst <= _DEVICES * largest, f"the output differs by {worst:.3g}, {what}"
