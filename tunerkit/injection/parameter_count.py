"""Counts how many parameters of a model are trained."""

from collections.abc import Iterable

import attrs
from torch import nn

from tunerkit.injection.root import inside
from tunerkit.injection.tuner import tuners_of
from tunerkit.libraries import whole_shape


@attrs.frozen
class Summary:
    """The numbers of parameters of a model.

    Attributes:
        trainable: The parameters that are trained now.
        total: All parameters, those of the adapters included.
        adapters: The parameters that each adapter trains, by its name.
    """

    trainable: int
    total: int
    adapters: dict[str, int]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2f} %)"


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
        trainable=_count(p for p in parameters if p.requires_grad),
        total=_count(parameters),
        adapters={
            name: _count(p for p in tuner.parameters() if p.requires_grad) for name, tuner in tuners_of(model).items()
        },
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(whole_shape(parameter).numel() for parameter in parameters)
