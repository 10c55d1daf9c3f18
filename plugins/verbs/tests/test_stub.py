"""The names under which core offers these verbs: found by everyone, and known to type checkers as they are."""

import ast
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunerkit
from tunerkit import plugin
from tunerkit_verbs.calibrate import calibrate
from tunerkit_verbs.method import Gain, method, parameter

STUB = Path(tunerkit.__file__).with_name("__init__.pyi")
FUNCTIONS: list[Callable[..., Any]] = [calibrate, method, parameter]


def test_verbs_are_found_in_core_and_names_of_authors_among_theirs() -> None:
    """The objects are those of this distribution; ``dir`` and ``*`` have the verbs; an authors' name warns there."""
    assert tunerkit.calibrate is calibrate
    assert tunerkit.method is method
    assert vars(plugin)["__getattr__"]("parameter") is parameter
    names = getattr(tunerkit, "__all__")  # noqa: B009 - the stub has none
    assert {"calibrate", "method"} <= {*names} & {*dir(tunerkit)}
    assert "parameter" not in names
    assert vars(plugin)["__getattr__"]("Gain") is Gain
    with pytest.warns(DeprecationWarning, match=r"write: from tunerkit\.plugin import parameter$"):
        getattr(tunerkit, "parameter")  # noqa: B009 - its old place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec("from tunerkit.plugin import parameter; from tunerkit import *", {})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_stub_of_core_has_the_function_as_it_is(function: Callable[..., Any]) -> None:
    """Law: parameters, their kinds and their defaults are the same; type checkers see the stub alone."""
    stub = ast.parse(STUB.read_text(encoding="utf-8"))
    (declared,) = (each for each in stub.body if isinstance(each, ast.FunctionDef) and each.name == function.__name__)
    own = ast.parse(inspect.getsource(function)).body[0]
    assert isinstance(own, ast.FunctionDef)
    for arguments in (declared.args, own.args):
        for each in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
            if each is not None:
                each.annotation = None  # the stub has no aliases
    assert ast.dump(declared.args) == ast.dump(own.args)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (calibrate, "(model, batches, adapter=None, *, loss=None)"),
        (method, "(name, *, sizes=None, **record)"),
        (parameter, "(*shape, start=0.0, trained=True)"),
    ],
)
def test_no_parameter_has_changed(function: Callable[..., Any], parameters: str) -> None:
    """What users call stays as it was in core."""
    found = inspect.signature(function)
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    assert str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty)) == parameters
