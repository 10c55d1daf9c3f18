"""The hooks: a child for each stack, its base-layer kind, and the default targets of mixtures."""

from collections.abc import Iterable, Sequence

from torch import nn

import tunerkit
from tunerkit.plugin import BaseLayer, DefaultTargets, hookimpl
from tunerkit_experts import described as described
from tunerkit_experts.default_targets import DEFAULT_TARGETS
from tunerkit_experts.layouts import put_stacks_, remove_stacks_
from tunerkit_experts.stacks import NAME, StackLayer
from tunerkit_experts.unpacked import warn_of_unpacked


@hookimpl
def tunerkit_base_layers() -> Iterable[type[BaseLayer]]:
    """Return the kind of stacks."""
    return [StackLayer]


@hookimpl
def tunerkit_default_targets() -> Iterable[DefaultTargets]:
    """Return the default targets of mixtures: attention, experts and shared experts."""
    return DEFAULT_TARGETS


@hookimpl
def tunerkit_prepare(model: nn.Module) -> None:
    """Put a child beside each stacked weight, so that it can be a target."""
    put_stacks_(model)
    if not tunerkit.adapters(model):
        warn_of_unpacked(model)


@hookimpl
def tunerkit_adapted(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Take the children away where no stack has an adapter."""
    adapted = {id(module) for module in modules}
    remove_stacks_(model, lambda experts: any(id(stack) in adapted for stack in getattr(experts, NAME).children()))


@hookimpl
def tunerkit_unwrapped(model: nn.Module) -> None:
    """Take all children away."""
    remove_stacks_(model)
