"""Read an adapter's contents: factors, copies and biases for other programs, counts, and groups for optimizers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.errors import AdapterError
from tunerkit.injection.slots import inside, slots_of
from tunerkit.injection.tuner import Summary, Tuner, count, slots_in, tuners_of
from tunerkit.records import Factors

_INSTEAD = "Call tunerkit.unwrap(model, keep_merged=True) and save the whole model instead"


@torch.no_grad()
def factors_of(tuner: Tuner) -> dict[str, Factors]:
    """Return an adapter's ΔW at each target as low-rank factors, on the CPU and without gradients.

    Args:
        tuner: The adapter's handle.

    Returns:
        The products by target path: q (r, in), p (out, r). The rank r differs between targets and may be 0.

    Raises:
        AdapterError: The method's ΔW is not a low-rank product, or the method also adds to biases.
        PluginError: The method's plugin returns an invalid answer.
    """
    method, adapters = tuner.method, tuner.adapters()
    if not hooks.has_factors(method):
        raise AdapterError(
            f"the ΔW of method {method!r} is not a product of two small matrices (its plugin does not implement "
            f"tunerkit_factors), and the formats of other programs support only such products. {_INSTEAD}"
        )
    found, shapes, is_complete = {}, set(), hooks.adds_products(method)
    for target in tuner.targets:
        path, slots = target.path, slots_of(target.module)
        assert slots is not None
        assert slots.base is not None
        base, adapter = slots.base, adapters[path]
        shape = base.shape
        # Deltas are large, so biases are checked for one target of each shape.
        if not is_complete and shape not in shapes:
            shapes.add(shape)
            if hooks.delta(path, method, adapter, base).bias is not None:
                raise AdapterError(
                    f"method {method!r} also adds to the bias of {path!r}, which the formats of other programs do not "
                    f"support. {_INSTEAD}"
                )
        found[path] = Factors(*(tensor.detach().cpu() for tensor in hooks.factors(path, method, adapter, base)))
    return found


def copies_of(tuner: Tuner) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the modules that an adapter trains in full, on the CPU, by module path and local name."""
    return {
        path: {name: tensor.detach().cpu() for name, tensor in slot.copy.state_dict().items()}
        for path, slot in slots_in(tuner)
        if slot.copy is not None
    }


def biases_of(tuner: Tuner) -> dict[str, Tensor]:
    """Return an adapter's trained biases (out,) by module path, on the CPU; modules trained in full are left out."""
    return {path: slot.bias.detach().cpu() for path, slot in slots_in(tuner) if slot.bias is not None}


def trainable_parameters(model: nn.Module) -> Summary:
    """Count the parameters that a model trains.

    Args:
        model: A model, wrapped or not.

    Returns:
        The counts. Printed, they give the share: ``"1,536 of 66,048 parameters are trained (2.33 %)"``.

    Raises:
        AdapterError: ``model`` is not a module, or several parts of it were wrapped on their own.
    """
    parameters = list(inside(model).parameters())
    return Summary(
        trainable=count(p for p in parameters if p.requires_grad),
        total=count(parameters),
        adapters={
            name: count(p for p in tuner.parameters() if p.requires_grad) for name, tuner in tuners_of(model).items()
        },
    )


def regrouped(groups: Iterable[dict[str, Any]], tuners: Iterable[Tuner]) -> list[dict[str, Any]]:
    """Return an optimizer's ``groups``; parameters with an own learning rate or the like move to new groups at the end.

    The old groups stay, even if empty. If no method has settings, the groups are unchanged, so that an optimizer's
    saved state still fits.
    """
    spec = hooks.specs.tunerkit_param_groups
    wanted = [group for tuner in tuners for group in hooks.ask(spec, tuner.method, tuner=tuner) or ()]
    number = {id(parameter): at for at, group in enumerate(wanted) for parameter in group.parameters}
    plain: list[dict[str, Any]] = []
    split: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[int, list[Any]] = {-1: []}  # by index in ``wanted``; -1 for parameters without settings
        for parameter in group["params"]:
            parts.setdefault(number.get(id(parameter), -1), []).append(parameter)
        plain.append({**group, "params": parts.pop(-1)})
        for at, parameters in parts.items():
            other = wanted[at]
            decay = {} if other.weight_decay is None else {"weight_decay": other.weight_decay}
            split.append({**group, "params": parameters, "lr": group["lr"] * other.lr_scale, **decay})
    return [*plain, *split]
