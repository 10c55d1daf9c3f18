"""The trainable module of a method at a target: the base class of every method's adapter."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunerkit.layers.base_layer import BaseLayer
from tunerkit.layers.weights import whole_shape

_SHARED = "_shared"


class Adapter(nn.Module):
    """Abstract. A method's plugin builds one per target; core registers it as a child of the base layer.

    Build the parameters on the CPU in the default dtype. Core then moves the adapter to its base layer's device and
    to the config's ``adapter_dtype``, so one seed gives the same start on every device.

    A parameter that is built with ``requires_grad=False`` is never trained. All parameters and persistent buffers are
    saved, moved and cast with the adapter. A buffer with ``persistent=False`` is not saved: the method builds it again
    when the adapter is loaded.

    Attributes:
        reads_output: Whether the contribution of `forward` depends on the values of ``y``, as in y · l. If so, ``y`` is
            the base layer's own output, even if other adapters share the target, so that each can be merged alone. If
            `forward` only adds to ``y``, set it to False, which is faster.
        reads_weight: Whether the initialization, `forward` or the delta reads the base layer's weight, as in DoRA.
            This is always the base's own weight, without other adapters. A class must set this and ``reads_output``;
            in plugins for version 1 of the API, None counts as True.
        rank_dims: The dimension that is the rank, by the name of the parameter or persistent buffer, such as
            ``{"p": 1, "q": 0}``. Core then resizes them before it loads a file with another rank.
    """

    reads_output: ClassVar[bool | None] = None
    reads_weight: ClassVar[bool | None] = None
    rank_dims: ClassVar[Mapping[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        if self.rank_dims:
            self.register_load_state_dict_pre_hook(_resize_for)  # type: ignore[no-untyped-call]  # torch's own

    @property
    def rank(self) -> int:
        """Number of live triplets (or columns); by default the size that ``rank_dims`` names, and 0 without it."""
        own = {**dict(self.named_buffers()), **dict(self.named_parameters())}
        return next((whole_shape(own[name])[dim] for name, dim in self.rank_dims.items()), 0)

    @property
    def shared(self) -> nn.Module:
        """The module that `tunerkit_shared` built for all adapters of the method. It is not a child of the adapter.

        Raises:
            AttributeError: The method has no shared module, or the adapter is still being built, where
                `tunerkit_build_adapter` has it as an argument.
        """
        try:
            module: nn.Module = vars(self)[_SHARED]
        except KeyError:
            raise AttributeError from None  # this class alone makes hasattr return False
        return module

    @property
    def has_shared(self) -> bool:
        """Whether the method has a `shared` module."""
        return _SHARED in vars(self)

    def share(self, module: nn.Module) -> None:
        """Set `shared` to the module from `tunerkit_shared`. Core calls this after it has built the adapter."""
        vars(self)[_SHARED] = module  # not by assignment, which would make it a child of every adapter

    def forward(self, base: "BaseLayer", x: Tensor, y: Tensor) -> Tensor:
        """Add the adapter's contribution to the base layer's output.

        Never write into ``x`` or ``y``: ``y`` may be a view that autograd still needs. Only
        `tunerkit.plugin.add_low_rank` may overwrite the ``y`` that you pass to it; do not reuse that ``y``.

        Args:
            base: The base layer.
            x: The base layer's input.
            y: The base layer's output. If several adapters share the target, it includes the contributions of the
                earlier ones, unless the class ``reads_output``.

        Returns:
            The sum, in the shape and dtype of ``y``.

        Raises:
            NotImplementedError: The class does not define `forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward: define forward(base, x, y)")


def _resize_for(adapter: Adapter, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Hook before ``load_state_dict``: resize an adapter to the state's rank, if all other dimensions agree."""
    own = {**dict(adapter.named_buffers()), **dict(adapter.named_parameters())}
    dims, saved = adapter.rank_dims, {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
    if not dims.keys() <= saved.keys() or not all(
        _fits(value, own[name], dims.get(name)) for name, value in saved.items()
    ):
        return
    ranks = {saved[name].shape[dim] for name, dim in dims.items()}
    if len(ranks) == 1:
        (rank,) = ranks
        for name, dim in dims.items():
            tensor = own[name]
            if tensor.shape[dim] != rank:
                resize_(tensor, tensor.new_empty((*tensor.shape[:dim], rank, *tensor.shape[dim:][1:])))


def _fits(value: object, own: Tensor, dim: int | None) -> bool:
    """Whether a value is a tensor with the shape of ``own``, except in dimension ``dim``."""
    # ZeRO-3 empties parameters between uses: then they have one dimension, and their rank is unknown.
    if not isinstance(value, Tensor) or value.ndim != own.ndim or dim not in (None, *range(-own.ndim, own.ndim)):
        return False
    differing = {at for at, size in enumerate(own.shape) if value.shape[at] != size}
    return differing <= {None if dim is None else dim % own.ndim}


@torch.no_grad()
def resize_(parameter: Tensor, values: Tensor) -> None:
    """Replace a parameter's values and shape in place, by a contiguous copy of new values; drop its gradient.

    Args:
        parameter: The parameter or buffer to change.
        values: The new values, of any shape.
    """
    # While the loss of an earlier step is alive, autograd keeps the gradient's accumulation node, with the old shape.
    # A change of dtype makes autograd discard that node, hence the detour.
    parameter.grad = None
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    # Contiguous, as a loaded file's tensors are: products of other layouts differ in their last bits.
    parameter.data = values.clone(memory_format=torch.contiguous_format)
