"""The scan of a model: what it holds, whatever it says about itself, with each module asked once."""

from typing import Any

import pytest
from torch import nn

from tests.support.target_models import chosen, scanned, tied_pair
from tunerkit.errors import TargetError


def test_tied_names_every_parameter_that_several_modules_hold() -> None:
    """Law: a tie is one Parameter object under several full names; a shared module alone is no tie."""
    model = tied_pair()
    model["again"] = model["body"]
    model["body"].add_module("tunerkit", tied_pair())  # adapters may share parameters with each other
    assert dict(scanned(model).sharers) == {id(model["embed"].weight): ("odd.weight", "embed.weight")}


class Listed(nn.Module):
    """Two layers, behind methods as old code wrote them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.r = nn.Linear(4, 4)

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any:  # type: ignore[override]
        return super().named_parameters(prefix, recurse)

    def parameters(self) -> Any:  # type: ignore[override]
        return [parameter for parameter in super().parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("targets", "expected"), [("q", ["0.q"]), ("*", ["0.q", "0.r", "1"]), (None, None)])
def test_a_module_may_override_how_it_lists_its_parameters(targets: Any, expected: list[str] | None) -> None:
    """Law: selection reads what a module holds, and calls none of the methods that a model may override."""
    assert chosen(nn.Sequential(Listed(), nn.Linear(4, 4)), targets) == (expected or ["0.q", "0.r", "1"])
    with pytest.raises(TargetError, match="no module named 'z'"):
        chosen(Listed(), "z")


def test_a_model_that_contains_itself_is_refused() -> None:
    """Law: its paths have no end, and the error says where it begins again."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"l": nn.Linear(4, 4)})})
    model["a"].add_module("parent", model)
    with pytest.raises(TargetError, match=r"the model contains itself, at 'a\.parent\.a"):
        chosen(model, None)
