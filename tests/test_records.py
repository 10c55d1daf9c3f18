"""The records that tunerkit and its plugins exchange, and the checks of their fields."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tunerkit.plugin import (
    DefaultTargets,
    Delta,
    Description,
    Factors,
    Foreign,
    Format,
    Method,
    ModelLibrary,
    NewModules,
    ParamGroup,
    PluginError,
    Restriction,
    State,
    StatisticsRequest,
    WeightReader,
)
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
    (True, int, ""),
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
    ([3], Iterable[WeightReader] | None, "[0]"),
    ({"a": 1}, State | None, ""),
]
READER, METHOD = {"owner": "package.Owner", "children": ("out",)}, {"name": "toy", "config": State}
FORMAT = {"name": "toy", "sniff": len, "read": len, "write": len}
TYPES, TOYS, LOADER = {"model_types": ("toy",)}, {"name": "toys"}, {"loader": "load"}
NONE: dict[str, Any] = {"factors": {}}
GROUP: dict[str, Any] = {"parameters": []}
# Each record with fields, what is changed in them, and how the error begins; "..." stands for anything.
WRONG_RECORDS: list[tuple[Callable[..., object], dict[str, Any], dict[str, Any], str]] = [
    (WeightReader, READER, {"children": "out"}, "children of a WeightReader is 'out'; expected tuple[str, ...]"),
    (WeightReader, READER, {"children": ("a", None)}, "...with None at [1]; expected tuple[str, ...], with str there"),
    (WeightReader, READER, {"owner": nn.Linear}, "owner of a WeightReader is a type; expected str"),
    (WeightReader, READER, {"owner": "re:.*"}, "owner of a WeightReader is 're:.*'; expected plain names"),
    (DefaultTargets, {"names": ("out",)}, {"model_types": "toy"}, "model_types of a DefaultTargets is 'toy'; expected"),
    (DefaultTargets, TYPES, {"names": ("*.out",)}, "names of a DefaultTargets is ('*.out',); expec"),
    (Method, METHOD, {"name": "two words"}, "name of a Method is 'two words'; expected a word"),
    (Method, METHOD, {"start": "exactly"}, "start of method 'toy' is 'exactly'; expected one of ('exact', 'rounding')"),
    (Method, METHOD, {"start": True}, "start of method 'toy' is True"),
    (Method, METHOD, {"start": ["exact"]}, "start of method 'toy' is"),
    (Method, METHOD, {"targets": "biases"}, "targets of method 'toy' is 'biases'; ...'weights', 'outputs'"),
    (Method, METHOD, {"statistics": "inputs"}, "statistics of method 'toy' is 'inputs'; expected a tunerkit.plugin"),
    (StatisticsRequest, {}, {}, "...inputs=0, gradients=0) requests no statistics... as in tunerkit.plugin.Statistics"),
    (StatisticsRequest, {}, {"inputs": -1}, "...inputs=-1, ...as in tunerkit.plugin.StatisticsRequest(inputs=16)"),
    (StatisticsRequest, {}, {"inputs": True}, "inputs of a StatisticsRequest is True; expected int"),
    (StatisticsRequest, {"inputs": 8}, {"gradients": 2.0}, "gradients of a StatisticsRequest is 2.0; expected int"),
    (Method, METHOD, {"config": Delta()}, "config of method 'toy' is ...expected an attrs class derived from tunerkit"),
    (Method, METHOD, {"config": int}, "config of method 'toy' is <class 'int'>; expected an attrs class derived"),
    (Restriction, TOYS, {"refused": {}}, "restriction 'toys' recognizes nothing; expected classes or marks"),
    (Format, FORMAT, {"name": ""}, "name of a Format is ''; expected plain names"),
    (Format, FORMAT, {"read": None}, "read of format 'toy' is None; expected Callable"),
    (Format, FORMAT, {"options": dict}, "options of format 'toy' is <class 'dict'>; expected an attrs class"),
    (Format, FORMAT, {"describe": 3}, "describe of format 'toy' is 3; expected Callable"),
    (Foreign, {}, {"factors": []}, "factors of a Foreign is []; expected Mapping[str, tunerkit.plugin.Factors]"),
    (Foreign, {}, {"factors": {"conv": 3}}, "factors of a Foreign is {'conv': 3} with 3 at ['conv']; expected"),
    (Foreign, NONE, {"remarks": "text"}, "remarks of a Foreign is 'text'; expected Sequence[str]"),
    (Foreign, NONE, {"copies": {"head": {"w": 3}}}, "...with 3 at ['head']['w']; expected"),
    (State, {"values": {}}, {"tensors": {"a": 1}}, "tensors of a State is {'a': 1} with 1 at ['a']; expected"),
    (State, {"tensors": {}}, {"values": {1: 2}}, "values of a State is ...with 1 at [1]; expected ...with str there"),
    (ParamGroup, GROUP, {"lr_scale": -1.0}, "lr_scale of a ParamGroup is -1.0; expected a finite number"),
    (ParamGroup, GROUP, {"weight_decay": math.nan}, "weight_decay of a ParamGroup is nan; expected a fini"),
    (ParamGroup, {}, {"parameters": ["v"]}, "parameters of a ParamGroup is ...with 'v' at [0]; expected"),
    (NewModules, LOADER, {"whole": ["head"]}, "whole of a NewModules is ['head']; expected tuple[str, ...]"),
    (Description, {"method": "toy"}, {"labels": True}, "labels of a Description is True; expected int"),
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


@pytest.mark.parametrize(("record", "fields", "wrong", "words"), WRONG_RECORDS)
def test_a_record_refuses_a_wrong_field_when_it_is_made(
    record: Callable[..., object], fields: dict[str, Any], wrong: dict[str, Any], words: str
) -> None:
    """The error says the field, its value and what is allowed."""
    with pytest.raises(PluginError, match=f"^{re.escape(words).replace(re.escape('...'), '.*')}"):
        record(**{**fields, **wrong})


def test_a_mapping_that_computes_its_values_is_not_read_when_a_record_is_made() -> None:
    """A format may read each product of an adapter only when core takes it."""
    asked: list[str] = []

    class Computed(Mapping[str, Factors]):
        def __getitem__(self, key: str) -> Factors:
            asked.append(key)
            return Factors(q=torch.ones(1, 3), p=torch.ones(3, 1))

        def __iter__(self) -> Iterator[str]:
            return iter(["head"])

        def __len__(self) -> int:
            return 1

    assert Foreign(Computed()).factors["head"].rank == 1
    assert asked == ["head"]


def test_types_have_the_names_that_plugins_import() -> None:
    """Without the modules in which they happen to be defined."""
    assert type_name(WeightReader) == "tunerkit.plugin.WeightReader"
    assert type_name(Iterable[WeightReader] | None) == "Iterable[tunerkit.plugin.WeightReader] | None"
    assert type_name(Mapping[str, nn.Module]) == "Mapping[str, torch.nn.Module]"
    assert type_name(Literal["a", "b"]) == "one of ('a', 'b')"
