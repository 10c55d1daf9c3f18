"""Gradients withheld from an optimizer step: taken away before it, put back after it."""

from collections.abc import Iterable

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import PluginError
from tunerkit.libraries import torch_private

_EXPECTED = "return a list of the adapter's parameters, or None"


@attrs.define(eq=False)
class Withheld:
    """The gradients that the current step must not see, with the scale that they carry.

    An optimizer skips a parameter without a gradient: no update, no momentum, no weight decay.
    """

    gradients: list[tuple[Tensor, Tensor]] = attrs.field(factory=list)
    grad_scale: Tensor | None = None

    def take_(self, parameters: Iterable[nn.Parameter] | None, grad_scale: Tensor | None) -> None:
        """Take away the gradients of ``parameters``; those without a gradient are passed over.

        Args:
            parameters: What a method returned from `tunerkit_before_step`; None withholds nothing.
            grad_scale: The factor that the gradients carry (0-d), or None if they carry none.

        Raises:
            PluginError: If ``parameters`` is no collection of tensors.
        """
        self.grad_scale = grad_scale
        for parameter in _listed(parameters):
            if parameter.grad is not None:  # a parameter that is listed twice is taken once
                self.gradients.append((parameter, parameter.grad))
                parameter.grad = None

    @torch.no_grad()
    def put_back_(self, *, stepped: bool) -> None:
        """Put every withheld gradient back; calling this again does nothing.

        A fused optimizer divides the gradients it sees by ``grad_scale`` while it steps. Withheld gradients get the
        same division, so that after the step all gradients are in one unit. After a skipped or interrupted step they
        go back as they were, still scaled: the optimizer has not divided the others either. Multiplying by the scale
        again would not restore what the division rounded, so the division waits until the step is known to count.

        Args:
            stepped: Whether the optimizer updated its parameters.
        """
        held, self.gradients = self.gradients, []
        if stepped and self.grad_scale is not None:
            for device in {grad.device for _, grad in held}:
                own = [grad for _, grad in held if grad.device == device]
                torch_private.divide_(own, self.grad_scale.to(device))
        for parameter, grad in held:
            if stepped:
                parameter.grad = grad
            # Time has passed since an interrupted step: a newer gradient stays, and the parameter may have changed.
            elif parameter.grad is None and parameter.shape == grad.shape:
                parameter.grad = grad.to(parameter)


def _listed(parameters: object) -> list[Tensor]:
    """What a plugin returned, checked: a tensor alone would be taken apart without a word."""
    if parameters is None:
        return []
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise PluginError(f"tunerkit_before_step returned a {type(parameters).__name__}; {_EXPECTED}")
    found = list(parameters)
    for each in found:
        if not isinstance(each, Tensor):
            raise PluginError(f"tunerkit_before_step returned a list with a {type(each).__name__}; {_EXPECTED}")
    return found
