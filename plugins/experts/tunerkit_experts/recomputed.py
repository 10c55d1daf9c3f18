"""Backward passes over stacks that are computed at each use, without keeping all of them until then."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import is_parametrized


def recomputed(owner: nn.Module, name: str, weight: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autograd saves no part of ``weight``, but reads it again in the backward pass.

    A stack in 4 bits is unpacked for a product. If autograd kept that, the forward of a whole model would hold every
    stack in full precision, and packing would save nothing in training.

    Args:
        owner: The module of the stack.
        name: The stack's name. The context does nothing for an ordinary parameter.
        weight: What ``owner`` has under this name now, (E, out, in) or (E, in, out).
    """
    if not is_parametrized(owner, name) or torch.compiler.is_compiling():
        return nullcontext()
    own, saved = weight.untyped_storage().data_ptr(), _Saved(owner, name)

    def pack(tensor: Tensor) -> Any:
        return saved.described(tensor) if tensor.untyped_storage().data_ptr() == own else tensor

    return saved_tensors_hooks(pack, lambda kept: kept if isinstance(kept, Tensor) else saved.read(*kept))


class _Saved:
    """The parts of one stack that one product has saved: an expert's matrix each, or the whole."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name
        self.waiting = 0  # parts that no backward has read yet
        self.whole: Tensor | None = None  # while some wait, so that the stack is computed once for all experts

    def described(self, part: Tensor) -> Any:
        self.waiting += 1
        return part.size(), part.stride(), part.storage_offset()

    def read(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        weight: Tensor = getattr(self.owner, self.name) if self.whole is None else self.whole
        self.waiting -= 1
        self.whole = weight if self.waiting > 0 else None
        return weight.as_strided(size, stride, offset)
