"""Parameter groups: what an optimizer trains, with the learning rates that methods ask for."""

import math
from typing import Any

from torch import nn

from tunerkit import injection
from tunerkit.errors import StepError


def param_groups(model: nn.Module, *, lr: float, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Return everything that a wrapped model trains as parameter groups for an optimizer.

    A method may want a factor on the learning rate or its own weight decay for some of its parameters. If none does,
    the result is one group. A Trainer that is attached makes the same groups itself::

        optimizer = torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-3))
        tunerkit.attach(model, optimizer, total_steps=1000)

    Args:
        model: The wrapped model.
        lr: The learning rate.
        weight_decay: The weight decay of the parameters for which no method sets one; None for the optimizer's default.

    Returns:
        Groups with ``params`` and ``lr``, and ``weight_decay`` where one is set. Each trained parameter is in one of
        them.

    Raises:
        StepError: ``lr`` or ``weight_decay`` is not a number, or negative; or nothing is trained.
        AdapterError: The model has no adapter.
        PluginError: A method returns invalid groups.
    """
    own: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
    for name, value in {"lr": lr, **own}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise StepError(f"expected a finite number >= 0 as {name}, got {value!r}")
    root = injection.wrapped_model(model)
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    if not trained:
        raise StepError("every adapter is frozen, so there is nothing to train; call tunerkit.thaw first")
    return injection.regrouped([{"params": trained, "lr": lr, **own}], injection.require_tuners(root).values())
