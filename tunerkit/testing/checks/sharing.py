"""Checks of a module that all adapters of a method share, which `tunerkit_shared` built."""

from collections.abc import Mapping
from pathlib import Path
from unittest import SkipTest

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.testing.cases import Case, train, wrapped
from tunerkit.testing.checks.probing import filled


def check_shared_module_kept(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Neither a forward nor a training changes what the shared module keeps fixed."""
    model = wrapped(case, method, config)
    shared = _shared(model)
    fixed = _fixed(shared)
    before = {name: tensor.clone() for name, tensor in fixed.items()}
    train(model, case)
    for name, tensor in fixed.items():
        assert torch.equal(tensor, before[name]), (
            f"{name} of the shared module changed in training; only read it in forward and in the hooks"
        )


@torch.no_grad()
def check_shared_module_used(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """The output depends on the shared module, which is the only one: no adapter has a copy of it."""
    model = filled(case, method, config)
    shared = _shared(model)
    before = case.output(model)
    tensors = {**dict(shared.named_parameters()), **dict(shared.named_buffers())}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.mul_(1.5)
    assert not torch.equal(case.output(model), before), (
        "the output does not depend on the shared module; read it as self.shared in forward, and do not copy it"
    )
    held = {id(tensor) for tensor in tensors.values()}
    for path, adapter in tunerkit.tuner(model).adapters().items():
        own = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
        twice = [name for name, tensor in own.items() if id(tensor) in held]
        assert not twice, f"{path}: {', '.join(twice)} is a tensor of the shared module too; read it as self.shared"


def _shared(model: nn.Module) -> nn.Module:
    shared = tunerkit.tuner(model).shared
    if shared is None:
        raise SkipTest("the method's adapters share no module")
    return shared


def _fixed(shared: nn.Module) -> dict[str, Tensor]:
    fixed: dict[str, Tensor] = {name: p for name, p in shared.named_parameters() if not p.requires_grad}
    return {**fixed, **dict(shared.named_buffers())}
