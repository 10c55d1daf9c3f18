"""The base under a loaded adapter: the same one is accepted, another one is named by its differences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.adapter_files import assert_refused
from tests.support.toys import Toys
from tunerkit.errors import BaseMismatchError, TargetError

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")


def changed(toys: "Toys", change: Callable[[Any], object]) -> nn.Module:
    base = toys.net()
    with torch.no_grad():
        change(base)
    return base


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "norm", nn.Identity()), "this base lacks: norm.weight"),
        (lambda m: setattr(m, "more", nn.Linear(1, 1)), "only this base has: more.weight, more.bias"),
        (lambda m: setattr(m.layers, "0", nn.Linear(4, 9)), r"layers.0.weight \[8, 4\] -> \[9, 4\]"),
        (lambda m: m.conv.weight.mul_(1.02), "other values: conv.weight"),
        (lambda m: m.layers.__delitem__(1), r"no module named 'layers\.1'"),
        (lambda m: m.norm.weight[-1].add_(0.1), "other values: norm.weight"),
    ],
)
def test_another_base_is_refused(toys: "Toys", saved: Path, change: Any, words: str) -> None:
    """Other layers, shapes or values: the error names the differences, and nothing is loaded."""
    assert_refused(toys, saved, BaseMismatchError, words, base=changed(toys, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.head[2].weight.add_(1),
        lambda m: m.norm.bias.add_(1),
        lambda m: m.train(),
        lambda m: m.requires_grad_(False),
    ],
)
def test_the_same_base_is_accepted(toys: "Toys", saved: Path, change: Any) -> None:
    """The base may have another precision, or fresh values in a head or bias that is trained in full."""
    loaded = tunerkit.load(changed(toys, change), saved).float().eval()
    assert torch.allclose(loaded(toys.x()), toys.trained()(toys.x()), rtol=0.1, atol=0.1)


def test_a_fresh_head_is_replaced_and_shown_when_disabled(toys: "Toys", saved: Path) -> None:
    """The trained head is used; disabled shows this base's own head."""
    base = changed(toys, lambda m: m.head[2].weight.add_(1))
    fresh = base(toys.x())
    loaded = tunerkit.load(base, saved)
    assert torch.equal(loaded(toys.x()), toys.trained()(toys.x()))
    with tunerkit.disabled(loaded):
        assert torch.equal(loaded(toys.x()), fresh)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "other", m.conv), None),
        (lambda m: m.conv.to("meta"), "meta"),
    ],
)
def test_a_target_that_is_unfit_by_now_is_refused(toys: "Toys", saved: Path, change: Any, words: str | None) -> None:
    """A weight on meta is rejected as in wrap; a module that only has two names is not."""
    base = toys.net()
    change(base)
    if words is None:
        assert torch.equal(tunerkit.load(base, saved)(toys.x()), toys.trained()(toys.x()))
    else:
        assert_refused(toys, saved, TargetError, words, base=base)


def test_a_target_or_copy_that_is_tied_by_now_is_refused(toys: "Toys", tmp_path: Path) -> None:
    """With a tied weight, the module that shares it would lack the adapter, as in wrap."""

    def build(*, tie: str | None) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
        if tie is not None:
            model.get_submodule(tie).weight = model[1].weight
        return model

    config = {"targets": ["0"], "train_modules": ["2"]}
    path = tunerkit.save(tunerkit.wrap(build(tie=None), "toy-shift", config), tmp_path)
    for tie in ("0", "2"):
        assert_refused(toys, path, TargetError, "tied", base=build(tie=tie))
    assert list(tunerkit.tuner(tunerkit.load(build(tie=None), path)).adapters()) == ["0"]


def test_a_base_without_the_bias_that_was_trained_is_refused(toys: "Toys", tmp_path: Path) -> None:
    """The module is there and its bias is not: the error names the module."""
    model = toys.trained(targets=["layers.1"], bias="adapters")
    path = tunerkit.save(model, tmp_path)

    def drop(model: Any) -> None:
        model.layers[1].bias = None

    words = r"modules without the bias that the adapter trains: layers\.1"
    assert_refused(toys, path, BaseMismatchError, words, base=changed(toys, drop))


def test_a_launcher_of_one_process_lets_the_base_be_noted(toys: "Toys", monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine may empty the base in one process too, as ZeRO-3 does, so a later save needs what was noted before."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["layers.0"]})
    assert "layers.0.weight" in (tunerkit.tuner(model).progress.noted or {})
