"""After unwrap nothing is left: no child, no hook, no attribute, no frozen parameter."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from torch import nn

import tunerkit
from tests.support.interrupting import half_done
from tests.support.toys import FULL, Toys
from tunerkit.errors import AdapterError
from tunerkit.injection import tuners_of
from tunerkit.paths import is_adapter_path


@given(
    mask=st.integers(0, 2**14 - 1),
    adapters=st.lists(st.sampled_from(["toy-low-rank", "toy-shift"]), min_size=1, max_size=3),
    merged=st.booleans(),
)
@settings(max_examples=20)
@pytest.mark.filterwarnings("ignore::tunerkit.TunerkitWarning")
def test_unwrapping_leaves_nothing_behind(toys: "Toys", mask: int, adapters: list[str], merged: bool) -> None:
    """Whatever was trainable before, for any number of adapters, merged or not, the model is as it was."""
    model = toys.net(batch_norm=True)
    for bit, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(bool(mask >> bit & 1))
    before = toys.snapshot(model)
    for number, method in enumerate(adapters):
        config = {"targets": ["conv", "layers.0"], "bias": "all", **({} if number else {"train_modules": ["layers.1"]})}
        if number:
            config["bias"] = "adapters"
        tunerkit.wrap(model, method, config, adapter=str(number))
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".tunerkit." not in name)
    toys.fill_(model)
    if merged:
        tunerkit.merge(model)
    assert tunerkit.unwrap(model) is model
    assert toys.same(toys.snapshot(model), before)
    assert tuners_of(model) == {}


@pytest.mark.parametrize("merged", [False, True])
def test_unwrap_may_keep_what_is_merged(toys: "Toys", merged: bool) -> None:
    """With keep_merged, the plain model computes the same as the wrapped one, with the base's keys and types."""
    model, before = toys.trained(), toys.snapshot(toys.net())
    output = model(toys.x())
    if merged:
        tunerkit.merge(model)
    tunerkit.unwrap(model, keep_merged=True)
    after = toys.snapshot(model)
    assert toys.close(model(toys.x()), output)
    assert [after[key] == before[key] for key in ("keys", "types", "grad", "attributes")] == [True] * 4
    assert tuners_of(model) == {}


def test_hooks_of_the_users_stay_and_run(toys: "Toys") -> None:
    """Only our hooks are removed; a user's forward hooks survive wrapping and unwrapping."""
    model = toys.net()
    seen: list[int] = []
    model.conv.register_forward_hook(lambda *_: seen.append(0))
    tunerkit.wrap(model, "toy-shift", {"targets": ["conv"]})
    model(toys.x())
    assert len(model.conv._forward_hooks) == 2
    tunerkit.unwrap(model)(toys.x())
    assert len(model.conv._forward_hooks) == 1
    assert seen == [0, 0]


def test_what_holds_an_adapter_is_not_trained_in_full(toys: "Toys") -> None:
    """The copy would include the adapter: the error names the adapter and its place."""
    block = nn.Module()
    block.inner = nn.Linear(2, 2)
    model = nn.Sequential(nn.Linear(2, 2), copy.deepcopy(block))
    tunerkit.wrap(model, "toy-shift", {"targets": ["inner"]})
    with pytest.raises(AdapterError, match=r"cannot train '1' in full: adapter 'default' is at '1\.inner'"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["0"], "train_modules": ["1"]}, adapter="second")


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("layer.tunerkit.default.adapter.a", True),
        ("tunerkit.default.adapter.a", True),
        ("layer.tunerkit", False),
        ("tunerkit_head.weight", False),
        ("layer.weight", False),
    ],
)
def test_adapter_paths_are_recognised_by_a_whole_component(name: str, adapter: bool) -> None:
    """A parameter belongs to an adapter only if it is below a child called tunerkit; similar names don't count."""
    assert is_adapter_path(name) is adapter


def second(model: nn.Module) -> nn.Module:
    return tunerkit.wrap(model, "toy-shift", {"targets": ["conv"]}, adapter="b", seed=3)


def _two(toys: "Toys") -> Any:
    return toys.fill_(second(toys.trained(batch_norm=True)))


# How each call is prepared, the call, and the first function in it that changes the model.
INTERRUPTED: dict[str, tuple[Callable[["Toys"], Any], Callable[[Any, Path], object], str]] = {
    "wrap": (
        lambda toys: toys.net(batch_norm=True),
        lambda model, file: tunerkit.wrap(model, "toy-low-rank", FULL, seed=3),
        "inject_",
    ),
    "wrap again": (lambda toys: toys.trained(batch_norm=True), lambda model, file: second(model), "inject_"),
    "load": (lambda toys: toys.net(), tunerkit.load, "inject_"),
    "delete": (_two, lambda model, file: tunerkit.delete(model, "b"), "train_"),
    "unwrap": (_two, lambda model, file: tunerkit.unwrap(model), "restore_originals_"),
    "unwrap merged": (lambda toys: tunerkit.merge(_two(toys)), lambda m, _: tunerkit.unwrap(m), "restore_originals_"),
    "keep merged": (_two, lambda model, file: tunerkit.unwrap(model, keep_merged=True), "requiring_effect"),
}


@pytest.mark.filterwarnings("ignore::tunerkit.TunerkitWarning")
@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupt_leaves_no_half_wrapped_model(toys: "Toys", saved: Path, name: str) -> None:
    """Ctrl-C at any line of a call leaves the model as it was, or as the whole call leaves it."""
    prepare, call, after = INTERRUPTED[name]
    wrong = half_done(lambda: prepare(toys), lambda model: call(model, saved), after=after, points=14)
    assert wrong == []
