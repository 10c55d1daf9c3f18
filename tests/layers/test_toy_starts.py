"""A start whose delta is not 0: the main part of W is trained, and its start is taken away by a fixed twin."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.model_checks import check_common
from tests.support.toy_starts import PrincipalPlugin
from tests.support.toys import registering
from tunerkit_testing.known_cases import NETWORK
from tunerkit_testing.small import X, net, train, trainable

TARGETS: dict[str, Any] = {"targets": ["0", "2", "4"]}


_toys = registering(PrincipalPlugin())


def wrapped() -> nn.Module:
    return tunerkit.wrap(net(), "toy-principal", TARGETS, seed=0)


def trained() -> nn.Module:
    model = wrapped()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=5)
    losses = train(model, optimizer, 5)
    assert losses[-1] < losses[0]
    return model


def test_wrapping_changes_the_output_by_rounding_alone() -> None:
    """Within 1e-5 of the largest output, although what is trained is the largest part of each weight."""
    base, model = net(), wrapped()
    assert (model(X) - base(X)).abs().max() <= 1e-5 * base(X).abs().max()
    for target, adapter in zip(tunerkit.tuner(model).targets, tunerkit.tuner(model).adapters().values(), strict=True):
        product = adapter.get_parameter("b") @ adapter.get_parameter("a")
        weight = target.module.get_parameter("weight")
        assert torch.linalg.matrix_norm(weight - product, 2) < torch.linalg.matrix_norm(weight, 2)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"a", "b"}


def test_it_does_what_any_method_does() -> None:
    """Nothing was subtracted from the base's own weight, and what is merged is the difference to the start."""
    check_common("toy-principal", NETWORK)


@pytest.mark.parametrize("build", [wrapped, trained])
def test_it_is_saved_with_its_start(build: Any, tmp_path: Path) -> None:
    """The file has the twin, so another decomposition of the same weight, on another machine, does not matter."""
    model = build()
    path = tunerkit.save(model, tmp_path)
    loaded = tunerkit.load(net(), path, trainable=True)
    assert torch.equal(loaded(X), model(X))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    factors = [adapter.factors() for adapter in tunerkit.tuner(loaded).adapters().values()]  # type: ignore[operator]
    assert [each.rank for each in factors] == [4, 4, 4]


def test_a_reference_is_the_base() -> None:
    """What an untrained adapter adds is rounding alone."""
    pytest.importorskip("tunerkit_transformers", reason="it makes references")
    model = trained()
    before = model(X)
    assert torch.equal(tunerkit.reference(model)(X), before)
    base = net()
    assert (tunerkit.reference(wrapped())(X) - base(X)).abs().max() <= 1e-5 * base(X).abs().max()
