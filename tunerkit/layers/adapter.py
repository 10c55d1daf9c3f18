"""The trainable module of a method at a target: the class every method's adapter derives from."""

from torch import Tensor, nn

from tunerkit.layers.base import BaseLayer


class Adapter(nn.Module):
    """Abstract. A method's plugin builds one per target; core registers it beside the base layer.

    Build the parameters on the CPU in the default dtype: core moves the adapter to its base layer's device and to
    the config's ``adapter_dtype`` afterwards, so one seed gives one start on every device.
    """

    @property
    def rank(self) -> int:
        """Live triplets (or columns) of this adapter; 0 for a method that has no rank."""
        return 0

    def forward(self, base: "BaseLayer", x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` plus what the adapter adds.

        ``x`` is the base layer's input, ``y`` its output (the base layer's own shape and dtype, which must stay).
        Never write into ``x`` or ``y``: ``y`` may be a view that autograd still needs. What is handed to
        `tunerkit.add_low_rank` as ``y`` is given up to it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it adds: define forward(base, x, y)")
