"""The trainable module of a method at a target: the base class of every method's adapter."""

from torch import Tensor, nn

from tunerkit.layers.base import BaseLayer


class Adapter(nn.Module):
    """Abstract. A method's plugin builds one per target; core registers it as a child of the base layer.

    Build the parameters on the CPU in the default dtype. Core then moves the adapter to its base layer's device and
    to the config's ``adapter_dtype``, so one seed gives the same start on every device.
    """

    @property
    def rank(self) -> int:
        """Number of live triplets (or columns) of this adapter; 0 for a method without a rank."""
        return 0

    def forward(self, base: "BaseLayer", x: Tensor, y: Tensor) -> Tensor:
        """Add the adapter's contribution to the base layer's output.

        Never write into ``x`` or ``y``: ``y`` may be a view that autograd still needs. Only
        `tunerkit.add_low_rank` may overwrite the ``y`` that you pass to it; do not reuse that ``y``.

        Args:
            base: The base layer.
            x: The base layer's input.
            y: The base layer's output.

        Returns:
            The sum, in the shape and dtype of ``y``.

        Raises:
            NotImplementedError: The class does not define `forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it adds: define forward(base, x, y)")
