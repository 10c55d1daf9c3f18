"""Any module as a base layer of methods that adapt outputs, such as a norm or a block: it has no weight to add to."""

from typing import ClassVar, NoReturn, final

import attrs
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.layers.base import BaseLayer


@final
@attrs.frozen(eq=False)
class OutputLayer(BaseLayer):
    """A module of which only the output is known. A method sees the input and the output, and no matrix."""

    has_weight: ClassVar[bool] = False

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Never: only a method that adapts outputs gets this kind, where no other one matches."""
        return False

    @property
    def in_features(self) -> int:
        """Unknown."""
        self._refuse("in_features")

    @property
    def out_features(self) -> int:
        """Unknown."""
        self._refuse("out_features")

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Raise `AdapterError`: there is no weight."""
        self._refuse("project_in")

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """Raise `AdapterError`: there is no weight."""
        self._refuse("project_out")

    def dense(self) -> Tensor:
        """Raise `AdapterError`: there is no weight."""
        self._refuse("dense")

    def pack(self, weight: Tensor) -> Tensor:
        """Raise `AdapterError`: there is no weight."""
        self._refuse("pack")

    def _refuse(self, what: str) -> NoReturn:
        raise AdapterError(
            f"the base layer is a {type(self.module).__name__}, of which tunerkit knows no weight, so it has no "
            f"{what}; read the sizes from target.module in tunerkit_build_adapter"
        )
