"""A tensor in PEFT's shape and in tunerkit's, by the sizes that a method declares: see `declarations.Leaf`."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from tunerkit_peft.declarations import CHANNELS, IN, KERNEL, ONES, OUT, Leaf, Size


@attrs.frozen
class Features:
    """The sizes of a layer.

    Attributes:
        out: Its output features; 0 if it has no weight.
        inputs: Its input features; of a convolution the channels, and the kernel.
        kernel: The number of the kernel's dimensions.
        groups: Of a convolution.
    """

    out: int
    inputs: tuple[int, ...]
    kernel: int = 0
    groups: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Those that a shape may name."""
        channels = self.inputs[0] * self.groups if self.kernel else math.prod(self.inputs)
        return {OUT: self.out, IN: math.prod(self.inputs), CHANNELS: channels}


def features_of(module: nn.Module) -> Features:
    """Return the sizes of a layer. Of a norm or another module, the features of its weight are both."""
    if isinstance(module, nn.Embedding):
        return Features(module.embedding_dim, (module.num_embeddings,))
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        inputs = tuple(module.weight.shape[1:])
        return Features(module.out_channels, inputs, len(module.kernel_size), module.groups)
    if isinstance(module, nn.Linear):  # whose weight may be packed
        return Features(module.out_features, (module.in_features,))
    if not isinstance(weight, Tensor) or weight.ndim == 0:
        return Features(0, ())
    if type(module).__name__ == "Conv1D":
        return Features(weight.shape[1], (weight.shape[0],))
    return Features(weight.shape[0], tuple(weight.shape[1:]) or (weight.shape[0],))


def shape_of(leaf: Leaf, features: Features, chosen: Collection[str]) -> tuple[Size, ...] | None:
    """Return the shape of a leaf at one layer.

    Args:
        leaf: The leaf.
        features: The layer's.
        chosen: The settings that name this target.
    """
    for setting, shape in leaf.chosen.items():
        if setting in chosen:
            return shape
    return leaf.convolution if features.kernel and leaf.convolution is not None else leaf.shape


def misfit(shape: Sequence[int], sizes: Sequence[Size], features: Features, known: dict[str, int]) -> tuple[str, bool]:
    """Compare a tensor of PEFT's with the sizes that it should have.

    Args:
        shape: The tensor's shape in the file.
        sizes: The sizes.
        features: The layer's.
        known: The sizes that other tensors of this target have; those of this one are added.

    Returns:
        What is wrong, empty if nothing is; and whether another base model would have other features.
    """
    wanted = list(_expanded(sizes, features))
    layer = features.sizes
    expected = "[" + ", ".join(_shown(size, {**known, **layer}) for size in wanted) + "]"
    if len(wanted) != len(shape):
        return f"is {list(shape)}; expected {expected}", False
    if any(isinstance(size, str) and size not in layer and known.setdefault(size, here) != here
           for size, here in zip(wanted, shape, strict=True)):  # fmt: skip
        return f"is {list(shape)}; expected {expected}", False
    wrong = [size for size, here in zip(wanted, shape, strict=True) if {**known, **layer}.get(size, size) != here]  # type: ignore[arg-type]
    return (f"is {list(shape)}; expected {expected}", any(size != 1 for size in wrong)) if wrong else ("", False)


def _shown(size: Size, known: Mapping[str, int]) -> str:
    return f"{size} {known[size]}" if isinstance(size, str) and size in known else str(size)


def _expanded(sizes: Sequence[Size], features: Features) -> Iterator[Size]:
    for size in sizes:
        if size == ONES:
            yield from [1] * features.kernel
        elif size == KERNEL:
            yield from features.inputs if features.kernel else [IN]
        else:
            yield size


def ours(tensor: Tensor, leaf: Leaf, sizes: Sequence[Size] | None, features: Features) -> Tensor:
    """Return a tensor of PEFT's in the shape that it has here. `misfit` has found nothing."""
    if sizes is not None:
        shape, left = [], list(tensor.shape)
        for size in sizes:
            count = features.kernel if size == ONES else 1 + features.kernel if size == KERNEL else 1
            taken, left = left[:count], left[count:]
            if size not in (1, ONES):
                shape.append(math.prod(taken))
        tensor = tensor.reshape(shape)
    return (tensor.to(torch.int64) if leaf.integers else tensor).contiguous()


def theirs(tensor: Tensor, leaf: Leaf, sizes: Sequence[Size] | None, features: Features) -> Tensor:
    """Return a tensor of ours in PEFT's shape.

    Raises:
        ValueError: It has another number of dimensions than the sizes say.
    """
    if leaf.integers:
        tensor = tensor.to(getattr(torch, leaf.integers))
    if sizes is None:
        return tensor
    own = iter(tensor.shape)
    shape: list[int] = []
    try:
        for size in sizes:
            if size in (1, ONES):
                shape += [1] * (features.kernel if size == ONES else 1)
            elif size == KERNEL:
                shape += features.inputs if (merged := next(own)) == math.prod(features.inputs) else [merged]
            else:
                shape.append(next(own))
    except StopIteration:
        raise ValueError(f"{list(tensor.shape)} has fewer dimensions than {list(sizes)}") from None
    if more := list(own):
        raise ValueError(f"{list(tensor.shape)} has {len(more)} dimensions more than {list(sizes)}")
    return tensor.reshape(shape)
