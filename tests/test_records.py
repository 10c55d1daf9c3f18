"""The records that tunerkit and its plugins exchange, and the check of their types."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tunerkit.plugin import Delta, Factors, ModelLibrary, ParamGroup, State, WeightReader
from tunerkit.records import mistyped, type_name


def test_a_forward_may_build_factors_under_compile() -> None:
    """A method's forward can share the function that `tunerkit_factors` calls."""

    def product(q: Tensor, p: Tensor, x: Tensor) -> Tensor:
        factors = Factors(q=2 * q, p=p)
        return x @ factors.q.T @ factors.p.T

    q, p, x = torch.randn(2, 4), torch.randn(3, 2), torch.randn(5, 4)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, p, x), product(q, p, x))


def test_the_rank_of_factors_is_that_of_their_shapes() -> None:
    """It may be 0."""
    assert [Factors(q=torch.empty(r, 4), p=torch.empty(3, r)).rank for r in (0, 2)] == [0, 2]


Wrong: Any = WeightReader  # Any: what the records hold here is wrong on purpose
FITTING: list[tuple[object, object]] = [
    (3, int),
    (3, float),
    (None, int | None),
    ("exact", Literal["exact", "rounding"]),
    (len, Callable[[object], int]),
    (nn.Linear, type[nn.Module]),
    ({"a": torch.ones(1)}, Mapping[str, Tensor]),
    ([nn.ReLU()], Iterable[nn.Module]),
    ({"a", "b"}, Sequence[str]),
    ((1, "a"), tuple[int, str]),
    ((), tuple[str, ...]),
    ([WeightReader("package.Owner", ("out",)), WeightReader("package.Other", ())], Iterable[WeightReader]),
    ([ModelLibrary()], Iterable[ModelLibrary]),
    (Delta(bias=torch.ones(1)), Delta | None),
    (object(), Any),
]
WRONG: list[tuple[object, object, str]] = [
    (True, float, ""),
    (None, int, ""),
    ("exactly", Literal["exact", "rounding"], ""),
    (3, Callable[[object], int], ""),
    (nn.Linear, type[nn.ReLU], ""),
    (nn.Linear(1, 1), type[nn.Module], ""),
    ("text", Iterable[str], ""),
    (torch.ones(2), Iterable[Tensor], ""),
    ({"a": 1}, Iterable[str], ""),
    (["a", 1, 2], Sequence[str], "[1]"),
    ({1: "a"}, Mapping[str, str], "[1]"),
    ({"a": ["b", 3]}, Mapping[str, Sequence[str]], "['a'][1]"),
    ((1, 2), tuple[int, str], "[1]"),
    ((1,), tuple[int, str], ""),
    (["out"], tuple[str, ...], ""),
    ([Wrong("package.Owner", "out")], Iterable[WeightReader], "[0].children"),
    ([Wrong("package.Owner", ("out", None))], Iterable[WeightReader] | None, "[0].children[1]"),
    (State(tensors={}, values={1: 2}), State | None, ".values[1]"),  # type: ignore[dict-item]
    ([ParamGroup([nn.Parameter(torch.ones(1))], lr_scale="fast")], Iterable[ParamGroup], "[0].lr_scale"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("value", "declared"), FITTING)
def test_a_value_of_its_declared_type_is_accepted(value: object, declared: object) -> None:
    """With all that it holds."""
    assert mistyped(value, declared) is None


@pytest.mark.parametrize(("value", "declared", "path"), WRONG)
def test_the_first_part_of_another_type_is_found_by_its_path(value: object, declared: object, path: str) -> None:
    """A plugin's author sees which part of an answer is wrong, and what it must be."""
    wrong = mistyped(value, declared)
    assert wrong is not None
    assert wrong[0] == path


def test_types_have_the_names_that_plugins_import() -> None:
    """Without the modules in which they happen to be defined."""
    assert type_name(WeightReader) == "tunerkit.plugin.WeightReader"
    assert type_name(Iterable[WeightReader] | None) == "Iterable[tunerkit.plugin.WeightReader] | None"
    assert type_name(Mapping[str, nn.Module]) == "Mapping[str, torch.nn.Module]"
    assert type_name(Literal["a", "b"]) == "one of ('a', 'b')"
