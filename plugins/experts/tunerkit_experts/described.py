"""Layouts of classes in transformers that do not use its experts interface."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tunerkit_experts.layouts import Layout, describe
from tunerkit_experts.routes import Route


def _llama4(experts: Any, multiply: Callable[[str, Tensor, Route], Tensor], hidden: Tensor) -> Tensor:
    """Llama 4 gives each expert all tokens, already weighted, so the rows of each expert are equally many."""
    rows = hidden.view(-1, experts.hidden_size)
    route = Route.equal(experts.num_experts, rows)
    gate, up = multiply("gate_up_proj", rows, route).chunk(2, dim=-1)
    return multiply("down_proj", up * experts.act_fn(gate), route)


describe(
    Layout(
        "transformers.models.llama4.modeling_llama4.Llama4TextExperts",
        {"gate_up_proj": True, "down_proj": True},
        _llama4,
    )
)
