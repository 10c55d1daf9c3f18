"""The function in transformers' experts interface: the forward of all classes that state their layout."""

from typing import Any, cast

import torch
from torch import Tensor

from tunerkit.plugin import AdapterError
from tunerkit_experts.routes import Form, Route
from tunerkit_experts.stacks import NAME, Stack
from tunerkit_experts.transformers_private import interface

FUNCTION = "tunerkit"  # its name in the interface
_FORMS = ("eager", "grouped_mm", "batched_mm")


def run_experts(experts: Any, hidden: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """Run the experts of one block as the chosen implementation does, with a call of a child for each stack.

    Args:
        experts: The experts module.
        hidden: The tokens, (T, hidden).
        ids: The experts of each token, (T, k) int64.
        scores: The weights of these experts, (T, k).

    Returns:
        (T, hidden), equal to transformers' implementation bit for bit where no adapter adds anything.

    Raises:
        AdapterError: The model runs with another implementation than eager, grouped_mm or batched_mm.
    """
    form = _form(experts)
    active = ids.shape[-1]
    if form == "eager":  # the order of its loop: by expert, then by choice, then by token
        sorted_ids, order = torch.sort(ids.t().reshape(-1), stable=True)
        tokens, choices = order % len(hidden), order.div(len(hidden), rounding_mode="floor")
    elif form == "grouped_mm":
        sorted_ids, order = torch.sort(ids.reshape(-1))
        tokens, choices = order.div(active, rounding_mode="floor"), order % active
    else:
        sorted_ids = ids.reshape(-1)
        order = torch.arange(len(sorted_ids), device=ids.device)
        tokens, choices = order.div(active, rounding_mode="floor"), order % active
    out = _apply(experts, hidden[tokens], Route(sorted_ids, experts.num_experts, form)) * scores[tokens, choices, None]
    if form == "eager":
        return torch.zeros_like(hidden).index_add_(0, tokens, out.to(hidden.dtype))
    if form == "grouped_mm":
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        out = out[inverse]
    return out.view(len(hidden), active, -1).sum(dim=1).to(hidden.dtype)


def _apply(experts: Any, rows: Tensor, route: Route) -> Tensor:
    """Run the two products of each row's expert, and what lies between and after them."""
    up, down = cast("list[Stack]", list(getattr(experts, NAME).children()))
    inner = up.multiply(experts, rows, route)
    act = experts._apply_gate if experts.has_gate else experts.act_fn
    # Its last bits depend on where a row stands in its tensor, and the loop has one tensor for each expert.
    inner = torch.cat([act(part) for part in inner.split(route.counts)]) if route.form == "eager" else act(inner)
    out = down.multiply(experts, inner, route)
    return experts.post_expert_norm(out) if experts.has_post_expert_norm else out


def _form(experts: Any) -> Form:
    stacks = getattr(experts, NAME, None)
    chosen = None if stacks is None else stacks.config._experts_implementation or "eager"
    if chosen in _FORMS:
        return cast(Form, chosen)
    raise AdapterError(
        f"the experts run with the implementation {chosen!r}, which would pass over their adapters; call "
        f"model.set_experts_implementation with one of {', '.join(map(repr, _FORMS))}"
    )


def register_() -> bool:
    """Put `run_experts` into transformers' interface; return False if no model of transformers has experts."""
    if (found := interface()) is None:
        return False
    found.register(FUNCTION, run_experts)
    return True
