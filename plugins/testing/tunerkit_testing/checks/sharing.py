"""Checks of a module that all adapters of a method share, which `tunerkit_shared` built."""

from unittest import SkipTest

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit.injection import slots_of
from tunerkit_testing.cases import SEED, Trial, train
from tunerkit_testing.checks.probing import (
    filled,
    shared_in,
)


def check_shared_module_kept(trial: Trial) -> None:
    """Building the adapters changes nothing of the shared module, and training nothing that it keeps fixed."""
    model = trial.wrapped()
    shared = _shared(model)
    returned = _tensors(_returned(model))  # the same names: `wrap` refuses others
    for name, tensor in _tensors(shared).items():
        assert torch.equal(tensor, returned[name].to(tensor)), (
            f"{name} of the shared module is not what tunerkit_shared returns with the same seed; only read it in "
            "tunerkit_build_adapter, and draw it from torch's random state"
        )
    fixed = _fixed(shared)
    before = {name: tensor.clone() for name, tensor in fixed.items()}
    train(model, trial.case)
    for name, tensor in fixed.items():
        assert torch.equal(tensor, before[name]), (
            f"{name} of the shared module changed in training; only read it in forward and in the hooks"
        )


@torch.no_grad()
def check_shared_module_used(trial: Trial) -> None:
    """The output depends on the shared module, which is the only one: no adapter has a copy of it."""
    model = filled(trial)
    shared = _shared(model)
    before = trial.output(model)
    tensors = _tensors(shared)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.mul_(1.5)
    assert not torch.equal(trial.output(model), before), (
        "the output does not depend on the shared module; read it as self.shared in forward, and do not copy it"
    )
    held = {id(tensor) for tensor in tensors.values()}
    for path, adapter in tunerkit.tuner(model).adapters().items():
        twice = [name for name, tensor in _tensors(adapter).items() if id(tensor) in held]
        assert not twice, f"{path}: {', '.join(twice)} is a tensor of the shared module too; read it as self.shared"


def _shared(model: nn.Module) -> nn.Module:
    shared = shared_in(tunerkit.tuner(model))
    if shared is None:
        raise SkipTest("the method's adapters share no module")
    return shared


def _returned(model: nn.Module) -> nn.Module:
    """What `tunerkit_shared` returns before any adapter is built, with the seed that ``model`` was wrapped with."""
    tuner = tunerkit.tuner(model)
    found = [slots_of(target.module) for target in tuner.targets]
    bases = [slots.base for slots in found if slots is not None and slots.base is not None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        spec = hooks.specs.tunerkit_shared
        shared = hooks.ask(spec, tuner.method, targets=tuner.targets, bases=bases, config=tuner.config)
    assert shared is not None
    return shared


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _fixed(shared: nn.Module) -> dict[str, Tensor]:
    """Buffers, and parameters that are not trained."""
    return {name: tensor for name, tensor in _tensors(shared).items() if not tensor.requires_grad}
