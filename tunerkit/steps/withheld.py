"""Withhold gradients from an optimizer step: remove them before the step and put them back after it."""

from collections.abc import Iterable

import attrs
import torch
from torch import Tensor

from tunerkit.libraries import torch_private


@attrs.define(eq=False)
class Withheld:
    """The gradients that the current step must not use, and their scale.

    An optimizer skips a parameter without a gradient: it applies no update, no momentum and no weight decay.
    """

    gradients: list[tuple[Tensor, Tensor]] = attrs.field(factory=list)
    grad_scale: Tensor | None = None

    def take_(self, parameters: Iterable[Tensor], grad_scale: Tensor | None) -> None:
        """Remove the gradients of ``parameters``. A parameter without a gradient is skipped.

        Args:
            parameters: The parameters that a method returned from `tunerkit_before_step`.
            grad_scale: The factor by which the gradients are scaled (0-d), or None if they are not scaled.
        """
        self.grad_scale = grad_scale
        for parameter in parameters:
            if parameter.grad is not None:
                self.gradients.append((parameter, parameter.grad))
                parameter.grad = None

    @torch.no_grad()
    def put_back_(self, *, stepped: bool) -> None:
        """Put back every withheld gradient. Calling this again does nothing.

        A fused optimizer divides the gradients by ``grad_scale`` while it steps. Withheld gradients are divided too, so
        that afterwards all gradients have the same scale. After a skipped or interrupted step they are put back still
        scaled, because the optimizer has not divided the others either. The division happens only here, because
        multiplying again could not undo its rounding.

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
            # After an interrupted step a newer gradient may exist, or the parameter may have another shape.
            elif parameter.grad is None and parameter.shape == grad.shape:
                parameter.grad = grad.to(parameter)
