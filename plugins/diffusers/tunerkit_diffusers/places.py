"""The modules of a model that a LoRA file can adapt, with their shapes."""

import math

import attrs
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tunerkit.plugin import FileError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADAPTERS = "tunerkit"  # the name of the child that holds a module's adapters


@attrs.frozen
class Place:
    """A linear or convolution layer.

    Attributes:
        path: The dotted path.
        inner: (in,) of a linear layer, (C_in, *kernel) of a convolution: the shape of a row of the weight.
        out: Output features or channels.
    """

    path: str
    inner: tuple[int, ...]
    out: int

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer."""
        return len(self.inner) == 1

    @property
    def in_features(self) -> int:
        """The columns of Q."""
        return math.prod(self.inner)

    def down(self, q: Tensor) -> Tensor:
        """(r, in) to (r, *inner), as files hold it."""
        return q.reshape(q.shape[0], *self.inner)

    def up(self, p: Tensor) -> Tensor:
        """(out, r) to (out, r), or to (out, r, 1, ...) of a convolution."""
        return p.reshape(*p.shape, *[1] * (len(self.inner) - 1))


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return all modules of a model that a file can adapt, by path. Only names, types and shapes are used."""
    found = {}
    for path, module in model.named_modules():
        if _ADAPTERS not in path.split(".") and obstacle_at(module) is None:
            found[path] = _place(path, module)
    return found


def place_at(model: nn.Module, path: str, format: str) -> Place:
    """Return one module of a model.

    Raises:
        FileError: Files in this format cannot adapt it.
    """
    module = model.get_submodule(path)
    if obstacle := obstacle_at(module):
        raise FileError(
            f"format {format!r} cannot hold the adapter of {path!r}: {obstacle}. Leave it out of the targets "
            f"(exclude=({path!r},)), or call tunerkit.unwrap(model, keep_merged=True) and save the whole model"
        )
    return _place(path, module)


def obstacle_at(module: nn.Module) -> str | None:
    """Say why files cannot adapt a module; None if they can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "it is the output projection of an nn.MultiheadAttention, where diffusers' adapters have no effect"
    if isinstance(module, nn.Linear):
        return None
    if not isinstance(module, _CONVOLUTIONS):
        return f"it is a {type(module).__name__}, and such files adapt linear and convolution layers only"
    # There, what diffusers adds is no change of the weight.
    if module.groups != 1:
        return f"it is a convolution with {module.groups} groups"
    if any(each != 1 for each in module.dilation):
        return f"it is a convolution with dilation {module.dilation}"
    if module.padding_mode != "zeros":
        return f"it is a convolution with padding mode {module.padding_mode!r}"
    return None


def _place(path: str, module: nn.Module) -> Place:
    if isinstance(module, nn.Linear):
        # Attributes, not the weight: a quantised one has another shape.
        return Place(path, (module.in_features,), module.out_features)
    assert isinstance(module, _CONVOLUTIONS)
    return Place(path, (module.in_channels, *module.kernel_size), module.out_channels)
