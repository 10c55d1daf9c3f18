"""Adapters that plugins build: what is none is refused by name, and a failure leaves the model as it was."""

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from torch import nn

import tunerkit
from tests.support.model_checks import untouched
from tests.support.toys import OneMethod, Toys
from tunerkit.errors import PluginError, TargetError
from tunerkit.plugin import Adapter, BaseLayer, Method, Target
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import Shift


def plugin_of(toys: "Toys", build: Any, name: str = "toy-broken") -> object:
    """A method whose build hook is ``build(target, base)``."""
    config = type(tunerkit.structure("toy-shift", {}))

    class Broken(OneMethod):
        method = Method(name, config=config)

        @tunerkit.hookimpl
        def tunerkit_build_adapter(self, target: Target, base: BaseLayer) -> Any:
            return build(target, base)

    return Broken()


def test_what_a_method_refuses_is_listed_in_one_error_with_the_way_out(toys: "Toys") -> None:
    """Each target with its path, its type and the method's own words; nothing is put into the model."""

    def build(target: Target, base: BaseLayer) -> Any:
        if target.path != "layers.1":
            raise TargetError(f"rank is 64, and at most {base.in_features} fits")
        return Shift(base)

    model = toys.net()
    plugin = plugin_of(toys, build)
    with registered(plugin), untouched(toys, model), pytest.raises(TargetError) as caught:
        tunerkit.wrap(model, "toy-broken", {"targets": ["conv", "layers.0", "layers.1"]})
    assert str(caught.value).splitlines() == [
        "conv: method 'toy-broken' cannot adapt this Conv2d: rank is 64, and at most 27 fits",
        "layers.0: method 'toy-broken' cannot adapt this Linear: rank is 64, and at most 4 fits; "
        "exclude=('conv', ...) leaves these targets out",
    ]
    cause = caught.value.__cause__
    assert cause is not None
    assert "plugin of method 'toy-broken'" in cause.__notes__[0]


@pytest.mark.parametrize("built", [None, nn.Linear(1, 1), "adapter", Adapter])
def test_what_is_no_adapter_is_refused_by_name(toys: "Toys", built: object) -> None:
    """The error names the method, its distribution, the target and the object that was built instead."""
    model = toys.net()
    plugin = plugin_of(toys, lambda target, base: built)
    words = r"tunerkit_build_adapter of .*'toy-broken' \(in-process\) returned (an? )?['\w]+ for 'layers.0'"
    with registered(plugin), untouched(toys, model), pytest.raises(PluginError, match=words):
        tunerkit.wrap(model, "toy-broken")


def test_an_adapter_that_holds_its_base_layer_is_refused(toys: "Toys") -> None:
    """As a descendant of itself, the base layer would make module walks endless and be cast to the adapter's dtype."""

    class Holder(Adapter):
        reads_output = reads_weight = False

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = toys.net().double()
    plugin = plugin_of(toys, lambda target, base: Holder(target.module))
    with (
        registered(plugin),
        untouched(toys, model),
        pytest.raises(PluginError, match=r"holds the base .* for 'layers\.0'"),
    ):
        tunerkit.wrap(model, "toy-broken")


@given(fails_at=st.integers(0, 2), mask=st.integers(0, 2**6 - 1), first=st.booleans())
@settings(max_examples=15)
def test_a_build_that_fails_midway_leaves_the_model_as_it_was(
    toys: "Toys", fails_at: int, mask: int, first: bool
) -> None:
    """The plugin fails at any target, with or without another adapter in the model: nothing has changed."""
    calls: list[str] = []

    def build(target: Target, base: BaseLayer) -> Adapter:
        calls.append(target.path)
        if len(calls) > fails_at:
            raise ZeroDivisionError("the plugin's own")
        return Adapter()

    model = toys.net() if first else toys.trained(targets=["layers.0"])
    for bit, parameter in enumerate(list(model.parameters())[:6]):
        parameter.requires_grad_(bool(mask >> bit & 1))
    config = {"targets": ["conv", "layers.0", "layers.1"], "train_modules": ["head"], "bias": "all"}
    with registered(plugin_of(toys, build)), untouched(toys, model), pytest.raises(ZeroDivisionError):
        tunerkit.wrap(model, "toy-broken", config, adapter="second", seed=1)
