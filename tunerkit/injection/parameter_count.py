"""How much of a wrapped model is trained."""

import attrs
from torch import nn

from tunerkit.injection.root import expect_module
from tunerkit.injection.tuner import tuners_of


@attrs.frozen
class Summary:
    """Counts of parameters: trained now, in the whole model with its adapters, and trained by adapter name."""

    trainable: int
    total: int
    adapters: dict[str, int]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2f} %)"


def trainable_parameters(model: nn.Module) -> Summary:
    """Count what ``model`` trains. A model without adapters is fine too."""
    parameters = list(expect_module(model).parameters())
    return Summary(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        adapters={
            name: sum(p.numel() for p in tuner.parameters() if p.requires_grad)
            for name, tuner in tuners_of(model).items()
        },
    )
