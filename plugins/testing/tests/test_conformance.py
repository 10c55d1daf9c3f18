"""The conformance tests accept methods that fulfil the contract, and detect violations."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import tunerkit
from tunerkit.plugin import BaseLayer, Method, Tuner
from tunerkit_testing import conformance
from tunerkit_testing.conformance import Case
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import Shift
from tunerkit_testing.toy_methods import ShiftConfig

if TYPE_CHECKING:
    from tests.support.toys import Toys

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")


class Row(Shift):
    """Claims to have a rank."""

    rank = 3


@attrs.frozen
class RowPlugin:
    """Each target goes from rank 3 to 2 in the first step, while the reported budget goes from 3 to ``last``."""

    last: int

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-row", config=ShiftConfig)]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Row:
        return Row(base)

    @tunerkit.hookimpl
    def tunerkit_after_step(self, tuner: Tuner, step: int) -> dict[str, int] | None:
        for adapter in tuner.adapters().values():
            vars(adapter)["rank"] = 2
        return tuner.ranks() if step == 1 else None

    @tunerkit.hookimpl
    def tunerkit_budget(self, tuner: Tuner, step: int | None) -> int:
        return len(tuner.targets) * (self.last if (tuner.steps if step is None else step) else 3)


@pytest.fixture
def claimed(request: pytest.FixtureRequest) -> Iterator[int]:
    """The budget for each target that a registered ``toy-row`` claims at the end."""
    with registered(RowPlugin(request.param)):
        yield request.param


def keep_statistics(model: nn.Module) -> None:
    model.train()
    model.get_submodule("batch_norm").eval()


def toy_case(toys: "Toys", start_training: Callable[[nn.Module], object] = keep_statistics) -> Case:
    """The toy net with a batch norm, its targets named by the case."""

    def output(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(toys.x())
        return found

    return Case(
        "toy",
        build=lambda: toys.net(batch_norm=True),
        output=output,
        loss=lambda model: model(toys.x()).square().mean(),
        settings={"targets": ["conv", "layers.0"], "train_modules": ["head"]},
        start_training=start_training,
    )


@pytest.mark.parametrize("check", conformance.CHECKS, ids=conformance.name_of)
@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
def test_a_method_that_keeps_the_contract_passes(
    toys: "Toys", check: conformance.Check, method: str, tmp_path: Path
) -> None:
    """Law: no check requires more than the contract, also for a model with batch norms and its own targets."""
    case = toy_case(toys)
    check(case, method, {}, tmp_path)
    assert conformance.name_of(case) == "toy"


def test_the_settings_of_a_case_hold_unless_the_check_is_given_others(toys: "Toys") -> None:
    """Law: the case gives the targets, and a method's own config overrides them."""
    case = toy_case(toys)
    tuner = tunerkit.tuner(conformance.wrapped(case, "toy-low-rank", {"rank": 3}))
    assert tuner.ranks() == {"conv": 3, "layers.0": 3}
    tuner = tunerkit.tuner(conformance.wrapped(case, "toy-low-rank", {"targets": ["layers.1"]}))
    assert list(tuner.ranks()) == ["layers.1"]


def test_a_parametrized_module_is_no_change_of_type(toys: "Toys", tmp_path: Path) -> None:
    """Law: weight norm makes a new class at each build; a real change of type is still detected."""

    def build() -> nn.Module:
        model: nn.Module = toys.net(batch_norm=True)
        weight_norm(model.get_submodule("layers.1"))
        return model

    case = attrs.evolve(toy_case(toys), build=build)
    conformance.check_unwraps(case, "toy-low-rank", {}, tmp_path)
    other = build()
    norm = type("OtherNorm", (nn.GroupNorm,), {})(2, 4)
    norm.load_state_dict(other.get_submodule("group_norm").state_dict())
    other.set_submodule("group_norm", norm)
    with pytest.raises(AssertionError, match="type at group_norm changed"):
        conformance.assert_base_untouched(other, case)


def test_training_that_moves_the_base_is_caught(toys: "Toys", tmp_path: Path) -> None:
    """Law: batch norms that a case leaves in training mode are named."""
    case = toy_case(toys, start_training=nn.Module.train)
    with pytest.raises(AssertionError, match=r"base tensor batch_norm\.running_mean changed"):
        conformance.check_trains_only_the_adapter(case, "toy-low-rank", {}, tmp_path)


@pytest.mark.parametrize("claimed", [1, 2, 3], indirect=True)
def test_ranks_that_do_not_make_up_the_budget_are_caught(toys: "Toys", claimed: int, tmp_path: Path) -> None:
    """Law: if the budget counts ranks, any difference from their sum is a failure."""
    case = toy_case(toys)
    if claimed == 2:
        conformance.check_meets_the_budget(case, "toy-row", {}, tmp_path)
    else:
        with pytest.raises(AssertionError, match="the live ranks sum to 4, the budget is"):
            conformance.check_meets_the_budget(case, "toy-row", {}, tmp_path)
    assert claimed in (1, 2, 3)
