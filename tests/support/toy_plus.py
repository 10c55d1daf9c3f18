"""A toy method that asks for parameter groups of its own, and what tests look up in groups."""

from typing import Any

from torch import nn

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import Method, ParamGroup, Tuner
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin


class PlusPlugin(OneMethod, LowRankPlugin):
    """``toy-plus``: trains ``b`` 16 times as fast as ``a``, as LoRA+ does, and without weight decay."""

    method = Method("toy-plus", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_param_groups(self, tuner: Tuner) -> list[ParamGroup]:
        fast = (parameter for name, parameter in tuner.named_parameters() if name.endswith(".b"))
        return [ParamGroup(fast, lr_scale=16.0, weight_decay=0.0)]


def ids(group: dict[str, Any]) -> set[int]:
    return {id(parameter) for parameter in group["params"]}


def named(model: nn.Module, *ends: str) -> set[int]:
    return {id(p) for name, p in model.named_parameters() if name.endswith(ends) and p.requires_grad}
