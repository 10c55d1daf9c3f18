"""Checks that gradients reach every adapter, and that no warning says otherwise."""

import warnings
from collections.abc import Mapping

import torch

import tunerkit
from tunerkit.plugin import Tuner
from tunerkit_testing.conformance import Case, wrapped


def check_reach_every_adapter(case: Case, method: str, config: Mapping[str, object], parameter: str) -> Tuner:
    """After one backward from the start, ``parameter`` of each adapter has a gradient; returns the tuner."""
    model = wrapped(case, method, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.loss(model).backward()
    for path, adapter in tunerkit.tuner(model).adapters().items():
        gradient = adapter.get_parameter(parameter).grad
        assert gradient is not None, path
        assert torch.count_nonzero(gradient), path
    return tunerkit.tuner(model)
