"""Layouts: which parameters of an experts class are stacks, and how the class runs with a child for each stack.

Classes with transformers' experts interface state their layout themselves. Others need a `Layout` from `describe`.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor, nn

from tunerkit.plugin import AdapterError, forward_name
from tunerkit_experts.interface import FUNCTION, register_
from tunerkit_experts.routes import Route
from tunerkit_experts.stacks import NAME, Stack

# What transformers' decorator sets on each experts module.
_STATED = ("is_transposed", "is_concatenated", "has_gate", "has_bias", "has_post_expert_norm", "_is_expert_parallel")


@attrs.frozen(eq=False)
class Layout:
    """A class of experts whose layout transformers does not state.

    Attributes:
        owner: The qualified name of the class that defines the forward: ``"package.module.Class"``.
        stacks: Whether a stack is transposed, (E, in, out), by the name of its parameter.
        forward: The forward of the class with another first step: it gets the module and ``multiply``, then the
            arguments of the call. ``multiply(name, rows, route)`` is the product of rows (N, in), sorted by expert,
            with the stack ``name``: (N, out). See `tunerkit_experts.Route`.
    """

    owner: str
    stacks: Mapping[str, bool]
    forward: Callable[..., Tensor]


_DESCRIBED: dict[str, Layout] = {}


def describe(layout: Layout) -> None:
    """Make the stacks of a class known, for all models that are wrapped later.

    Args:
        layout: The class and its stacks. A second layout of the same class replaces the first.
    """
    _DESCRIBED[layout.owner] = layout


class Stacks(nn.Module):
    """The child of an experts module with one `Stack` for each of its stacked weights.

    Attributes:
        config: The experts module's own config; None for a class from `describe`.
    """

    def __init__(self, owner: nn.Module, stacks: Mapping[str, bool], config: Any = None) -> None:
        super().__init__()
        self.config = config
        for name, is_transposed in stacks.items():
            self.add_module(name, Stack(owner, name, is_transposed=is_transposed))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        if self.config is not None:
            register_()  # a pickled model comes into a process that has wrapped none


def put_stacks_(model: nn.Module) -> None:
    """Give each experts module in ``model`` its `Stacks`, and make it run them. Modules with them stay as they are."""
    experts: Any  # their class is transformers' or an author's
    for experts in list(model.modules()):
        if isinstance(getattr(experts, NAME, None), Stacks):
            continue
        if (described := _DESCRIBED.get(forward_name(experts))) is not None:
            if "forward" in vars(experts):
                continue  # a library runs another forward, such as accelerate's for offloaded weights
            experts.add_module(NAME, Stacks(experts, described.stacks))
            vars(experts)["forward"] = functools.partial(_run_described, experts, described.owner)
        elif all(hasattr(experts, name) for name in _STATED) and register_():
            first = "gate_up_proj" if experts.has_gate else "up_proj"
            stated = dict.fromkeys((first, "down_proj"), bool(experts.is_transposed))
            experts.add_module(NAME, Stacks(experts, stated, experts.config))
            # A copy for this module: another implementation for the model cannot pass over the adapters then, and other
            # models with the same config are not affected.
            experts.config = copy.copy(experts.config)
            experts.config._experts_implementation_internal = FUNCTION


def remove_stacks_(model: nn.Module, kept: Callable[[nn.Module], bool] = lambda experts: False) -> None:
    """Take the `Stacks` out of each experts module in ``model``, except where ``kept`` of the module is true."""
    for experts in list(model.modules()):
        stacks = getattr(experts, NAME, None)
        if isinstance(stacks, Stacks) and not kept(experts):
            if stacks.config is not None:
                experts.config = stacks.config
            elif getattr(vars(experts).get("forward"), "func", None) is _run_described:  # else a library's around it
                del vars(experts)["forward"]
            delattr(experts, NAME)


def _run_described(experts: nn.Module, owner: str, /, *args: Any, **kwargs: Any) -> Tensor:
    """Run the forward of a described class: at module level, so that a model can be copied and pickled."""
    stacks = getattr(experts, NAME, None)
    if not isinstance(stacks, Stacks):  # taken out below a wrapper of this function
        own: Tensor = type(experts).forward(experts, *args, **kwargs)
        return own
    if owner not in _DESCRIBED:
        raise AdapterError(f"the layout of {owner} is not described in this process; import the plugin that does it")

    def multiply(name: str, rows: Tensor, route: Route) -> Tensor:
        stack = stacks.get_submodule(name)
        assert isinstance(stack, Stack)
        return stack.multiply(experts, rows, route)

    return _DESCRIBED[owner].forward(experts, multiply, *args, **kwargs)
