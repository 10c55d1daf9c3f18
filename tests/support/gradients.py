"""Checks that gradients reach every adapter, and that no warning says otherwise."""

import warnings
from collections.abc import Mapping

import torch

import tunerkit
from tunerkit.plugin import Tuner
from tunerkit_testing.conformance import Case, wrapped


def check_reach_every_adapter(case: Case, method: str, config: Mapping[str, object], parameter: str) -> Tuner:
    """After one backward pass from the start, a parameter of each adapter has a gradient that is not 0.

    Args:
        case: the model and its loss.
        method: the method's name.
        config: its settings, on top of those of the case.
        parameter: the name of a parameter of the adapters that has a gradient at the start.

    Returns:
        The tuner, for what the test knows of its targets.
    """
    model = wrapped(case, method, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.loss(model).backward()
    for path, adapter in tunerkit.tuner(model).adapters().items():
        gradient = adapter.get_parameter(parameter).grad
        assert gradient is not None, path
        assert torch.count_nonzero(gradient), path
    return tunerkit.tuner(model)
