"""Checks of copies and moves: deep copies, pickles, and weights that accelerate keeps elsewhere."""

import copy
import pickle
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest import SkipTest

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit.errors import TargetError, shown
from tunerkit.layers import Adapter, BaseLayer, torch_private
from tunerkit_testing.blaming import told
from tunerkit_testing.cases import Trial, assert_same, with_inputs
from tunerkit_testing.checks.probing import Call, calls_of, fill_, filled, own_parts, trained_parameters, unregistered
from tunerkit_testing.checks.training import ended

_DEVICES = 1e-3  # another device sums up in another order, and may multiply in a lower precision


def check_deepcopy(trial: Trial) -> None:
    """A deep copy of a trained model computes the same, and its adapters are its own."""
    model = ended(trial)
    before = trial.output(model)
    twin = copy.deepcopy(model)
    assert torch.equal(trial.output(twin), before), "a deep copy computes something else; " + _OWN
    fill_(twin)
    assert torch.equal(trial.output(model), before), "training a deep copy changes the original; " + _OWN
    assert not torch.equal(trial.output(twin), before), "a deep copy does not use its own parameters; " + _OWN


_OWN = "hold tensors only as parameters and buffers of the adapter, not in closures, lists or the plugin"


def check_pickle(trial: Trial) -> None:
    """Every adapter survives pickle, as spawned workers and torch.save need it."""
    tuner = tunerkit.tuner(filled(trial))
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


def check_offload(trial: Trial) -> None:
    """On a base whose weights accelerate loads for each forward, the output is the same, and the adapter trains.

    Forward and delta read W and the bias as the base layer gives them: where weights are offloaded, packed or sharded,
    the module has others.
    """
    model = filled(trial)
    for call in calls_of(model, trial):
        _assert_reads_the_layer(call, trial.method)
    if find_spec("accelerate") is None:
        raise SkipTest("accelerate is not installed")
    if find_spec("tunerkit_distributed") is None:
        raise SkipTest("tunerkit-distributed, which knows how accelerate holds weights, is not installed")
    cpu_offload = import_module("accelerate").cpu_offload

    # In fp64: loaded weights may lie in memory as other kernels read them, and deep models amplify fp32 rounding.
    trial = trial.in_fp64()
    expected = filled(trial)
    away = cpu_offload(trial.build().eval(), execution_device=torch.device("cpu"))
    try:
        trial.output(away)
    except Exception as error:
        raise SkipTest(f"the model itself does not run while it is offloaded: {shown(str(error))}") from error
    try:
        tunerkit.wrap(away, trial.method, trial.settings, seed=0)
    except TargetError as error:
        raise SkipTest(f"this model cannot be adapted while it is offloaded: {error}") from error
    fill_(away).eval()
    hint = "read the weight as base.dense() or base.matrix(), and build parameters from in_features and out_features"
    assert_same(
        trial.output(away), trial.output(expected), "offloaded against in memory", hint, adapters=[torch.float32]
    )
    trial.loss(away).backward()
    own = trained_parameters(tunerkit.tuner(away))
    meta = [name for name, parameter in own.items() if parameter.is_meta]
    assert not meta, f"{meta[0]} is on the meta device: it would not be trained; {hint}"
    assert any(parameter.grad is not None for parameter in own.values()), f"no parameter has a gradient; {hint}"


class _Elsewhere:
    """A base layer whose module has other numbers than the layer gives."""

    def __init__(self, base: BaseLayer) -> None:
        self.layer, self.module = base, copy.deepcopy(base.module)
        for parameter in torch_private.own_parameters(self.module).values():
            if parameter is not None:
                parameter.mul_(3)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    @property  # type: ignore[misc]  # object's can be written; methods may ask isinstance of a base layer
    def __class__(self) -> Any:
        return type(self.layer)


@torch.no_grad()
def _assert_reads_the_layer(call: Call, method: str) -> None:
    y = None if call.base.lends else call.run()
    given: list[Any] = [call.base, _Elsewhere(call.base)]
    parts: dict[str, list[Tensor]] = {}
    for base in given:
        if y is not None:
            parts.setdefault("forward", []).append(call.adapter(base, call.x, y.clone()))
        if call.base.has_weight and hooks.has_delta(method):
            delta = hooks.delta(call.path, method, call.adapter, base)
            for name, tensor in (("the delta", delta.weight), ("the delta's bias", delta.bias)):
                if tensor is not None:
                    parts.setdefault(name, []).append(tensor)
    for name, (own, other) in parts.items():
        assert torch.equal(own, other), (
            f"{call.path}: {name} is computed from the live weights of base.module; read W as base.dense() or "
            "base.matrix(), and the bias as base.bias(): where weights are packed, offloaded or sharded, the module "
            "has others, or none"
        )


def check_device(trial: Trial) -> None:
    """On another device an adapter computes all of its part there: it holds tensors as parameters and buffers alone.

    That is tried with torch's meta device, which has shapes and no numbers. On an accelerator, moved there or wrapped
    there, the model has the output that it has on the CPU.
    """
    model = filled(trial)
    for name, part in own_parts(model).items():
        saved = [tensor for tensor in part.state_dict().values() if isinstance(tensor, Tensor)]
        held = [key for key, value in unregistered(part) if isinstance(value, Tensor) and not _among(value, saved)]
        assert not held, (
            f"{name}: {held[0]} is a tensor that is neither a parameter nor a buffer: no model.to moves it, and no "
            "file has it; use register_buffer(name, tensor), with persistent=False if it is computed from the config"
        )
    for call in calls_of(model, trial):
        _assert_moves(call)
    if torch.accelerator.is_available():
        _assert_same_there(trial, model)


def _among(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    return any(tensor.shape == other.shape and torch.equal(tensor, other) for other in others)


def _assert_moves(call: Call) -> None:
    layer = copy.deepcopy(call.module)
    for module in [*layer.modules()]:
        if isinstance(module, Adapter) and module.has_shared:
            module.shared.to("meta")
    moved = attrs.evolve(
        call,
        module=layer.to("meta"),
        args=_on_meta(call.args),
        kwargs=dict(zip(call.kwargs, _on_meta(call.kwargs.values()), strict=True)),
    )
    try:
        moved.run()
    except Exception as error:
        # A forward may look at values, which the meta device has not, or ask for autocast there: nothing follows then.
        if isinstance(error, NotImplementedError) or any(each in told(error) for each in ("meta tensor", "autocast")):
            return
        raise AssertionError(
            f"{call.path}: moved to another device, forward raised {told(error)}; use no tensor there that is neither "
            "an argument, a parameter nor a buffer, such as a global one, and make new ones with device=x.device"
        ) from error


def _on_meta(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(value.to("meta") if isinstance(value, Tensor) else value for value in values)


def _assert_same_there(trial: Trial, model: nn.Module) -> None:
    device = torch.accelerator.current_accelerator()
    expected, start = trial.output(model), trial.output(trial.wrapped().eval())
    hint = "keep tensors in parameters and buffers, and build new ones on the device of x"
    moved = with_inputs(model.to(device), lambda x: x.to(device))
    _assert_near(trial.output(moved), expected, f"moved to {device}; {hint}")
    there = trial.on(
        attrs.evolve(trial.case, build=lambda: with_inputs(trial.build().to(device), lambda x: x.to(device)))
    )
    _assert_near(trial.output(there.wrapped().eval()), start, f"wrapped on {device}; {hint}")


def _assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    worst, largest = float((found.cpu() - expected).abs().max()), float(expected.abs().max())
    assert worst <= _DEVICES * largest, f"the output differs by {worst:.3g}, {what}"
