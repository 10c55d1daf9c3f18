"""The adapters of the toy methods, which outside authors copy: what holds for each of them."""

import pkgutil
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import tunerkit
import tunerkit_testing
from tests import support
from tunerkit.plugin import Method
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net

MODULES = [
    import_module(f"{package.__name__}.{m.name}")
    for package in (tunerkit_testing, support)
    for m in pkgutil.iter_modules(package.__path__)
    if m.name.startswith("toy_")
]
PLUGINS: list[Any] = [
    kind
    for module in MODULES
    for name, kind in vars(module).items()
    if name.endswith("Plugin") and kind.__module__ == module.__name__
]
METHODS = [
    (plugin, method)
    for plugin in PLUGINS
    if hasattr(plugin, "tunerkit_methods")
    for method in plugin().tunerkit_methods()
]


def net_for(method: Method) -> nn.Module:
    """A network whose first module the method adapts."""
    return nn.Sequential(nn.LayerNorm(X.shape[-1]), *net()) if method.targets == "norms" else net()


@pytest.mark.parametrize(("plugin", "method"), METHODS, ids=[method.name for _, method in METHODS])
def test_a_functional_call_uses_the_parameters_it_is_given(plugin: Any, method: Method) -> None:
    """Output and gradients of `functional_call` are those of a model with these parameters, also of shared ones."""
    generator = torch.Generator().manual_seed(0)
    with registered(plugin()):
        model, other = (tunerkit.wrap(net_for(method), method.name, {"targets": ["0"]}, seed=0) for _ in range(2))
        given = {
            name: parameter.detach() + 0.1 * torch.rand(parameter.shape, generator=generator)
            for name, parameter in model.named_parameters()
            if ".tunerkit." in name
        }
        with torch.no_grad():
            for name, values in given.items():
                other.get_parameter(name).copy_(values)
        for values in given.values():
            values.requires_grad_()
        called = functional_call(model, given, X)
        assert torch.equal(called, other(X))
        assert not torch.equal(model(X), other(X))
        trained = [name for name, parameter in other.named_parameters() if parameter.requires_grad]
        expected = torch.autograd.grad(other(X).square().sum(), [other.get_parameter(name) for name in trained])
        found = torch.autograd.grad(called.square().sum(), [given[name] for name in trained])
    torch.testing.assert_close(found, expected)
