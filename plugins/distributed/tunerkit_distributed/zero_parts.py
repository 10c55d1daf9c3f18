"""Shards of parameters under DeepSpeed's ZeRO: gather all ranks' shards, and write this rank's.

DeepSpeed's accessors (`safe_get_full_fp32_param` and the like) need one collective for each tensor; here one carries
all tensors. DeepSpeed's attributes that this relies on are used only in this file.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunerkit.errors import StepError
from tunerkit_distributed import group
from tunerkit_distributed.deepspeed_names import is_of_deepspeed
from tunerkit_distributed.flat import flat
from tunerkit_distributed.group import processes, rank
from tunerkit_distributed.zero_init import whole_shape

# Where each optimizer lists the model's parameters: ZeRO-1 and 2, ZeRO-3, and the one for bf16 with ZeRO-1.
_GROUPS = ("bit16_groups", "fp16_groups", "bf16_groups")
_FRAGMENT, _SHARD = "_hp_mapping", "ds_id"


class Parts(Protocol):
    """Reads and writes sharded parameters. All ranks must make the same calls, in the same order."""

    splits: bool

    def read(self, parameters: Sequence[nn.Parameter], *, gradients: bool, what: str) -> tuple[list[Tensor], Tensor]:
        """Gather values, and gradients if asked, in at most one collective.

        Args:
            parameters: Parameters for which `is_of_deepspeed` is true.
            gradients: Whether to read the gradients of trained parameters, which exist from the last backward to the
                step.
            what: The name of the tensors in messages.

        Returns:
            The full values, in fp32 for trained parameters, else in the parameter's dtype; and one fp32 vector of all
            gradients, for `unflatten`.
        """

    def write_(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        """Write full values, equal on all ranks. No collective."""

    def write_gradients_(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Write full gradients, equal on all ranks, before the step. No collective."""


def trained_by(zero: Any) -> list[nn.Parameter]:
    """Return the model's parameters that DeepSpeed's optimizer trains. Raises `StepError` if they cannot be found."""
    groups = next((getattr(zero, name) for name in _GROUPS if hasattr(zero, name)), None)
    held = [] if groups is None else [parameter for group in groups for parameter in group]
    if not held or not all(is_of_deepspeed(parameter) for parameter in held):
        raise StepError(
            f"cannot find the parameters that DeepSpeed's {type(zero).__name__} trains: this release stores them "
            "elsewhere; install DeepSpeed 0.19, with which tunerkit is tested"
        )
    return held


def parts_of(parameters: Sequence[nn.Parameter]) -> Parts:
    """Return the `Parts` that fits the parameters of one DeepSpeed optimizer.

    Raises:
        StepError: A parameter is sharded over only some of the ranks, or shards are quantized, copied or on disk.
    """
    groups = [getattr(p, "ds_process_group", None) or getattr(p, "_dp_group", None) for p in parameters]
    if any(group is not None and torch.distributed.get_world_size(group) != processes() for group in groups):
        raise StepError(
            "DeepSpeed trains these adapters in several groups of processes (MiCS, hpZ, pipeline, tensor, sequence or "
            "expert parallel); only data parallel over all processes is supported"
        )
    if not any(hasattr(parameter, _SHARD) for parameter in parameters):
        return Fragments(splits=any(parameter.dtype != torch.float32 for parameter in parameters))
    for parameter in parameters:
        _refuse_odd_shard(parameter)
    return Shards()


def _refuse_odd_shard(parameter: Any) -> None:
    if parameter.ds_tensor.status.name != "AVAILABLE":
        raise StepError(
            "DeepSpeed offloads parameters to disk (offload_param: nvme), where adapters cannot be read; set it to cpu "
            "or none"
        )
    if parameter.ds_secondary_tensor is not None or hasattr(parameter.ds_tensor, "ds_quant_scale"):
        raise StepError(
            "DeepSpeed keeps a second or a quantized copy of the parameters (ZeRO++: zero_hpz_partition_size, "
            "zero_quantized_weights), which tunerkit would not update; leave these options out"
        )


class Fragments:
    """ZeRO-1 and 2: each rank has all parameters, but only a range of the flat master weights and gradients.

    A parameter's values may be in this rank's range, in another rank's, or in both. 16-bit parameters have fp32 master
    weights; fp32 parameters are their own.
    """

    def __init__(self, *, splits: bool) -> None:
        self.splits = splits

    @torch.no_grad()
    def read(self, parameters: Sequence[Any], *, gradients: bool, what: str) -> tuple[list[Tensor], Tensor]:
        """Gather by summing over all ranks: each rank's vector is 0 outside its own ranges. See `Parts`."""
        masters = [p for p in parameters if p.dtype != torch.float32]
        trained = [p for p in parameters if gradients and p.requires_grad]
        sizes = [p.numel() for p in (*masters, *trained)]
        vector = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
        pieces = vector.split(sizes)
        for parameter, piece in zip(masters, pieces, strict=False):
            own = getattr(parameter, _FRAGMENT)
            if own is not None:
                _range(own, piece).copy_(own.get_hp_fragment())
        for parameter, piece in zip(trained, pieces[len(masters) :], strict=True):
            own = getattr(parameter, _FRAGMENT)
            if own is not None:
                part = _range(own, piece)
                found = own.get_lp_grad_fragment(parameter._index_in_param_group).reshape(-1)
                part.copy_(_range(own, found) if found.numel() == parameter.numel() else found)
        if sizes:
            group.reduce_(vector, what)
        whole = {id(p): piece.view(p.shape) for p, piece in zip(masters, pieces, strict=False)}
        values = [whole[id(p)] if id(p) in whole else p.detach().clone() for p in parameters]
        return values, vector[sum(sizes[: len(masters)]) :]

    @torch.no_grad()
    def write_(self, parameters: Sequence[Any], values: Sequence[Tensor]) -> None:
        """Write this rank's ranges of the master weights, and the full parameters. See `Parts`."""
        utils = _accessors()
        for parameter, value in zip(parameters, values, strict=True):
            utils.safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)

    @torch.no_grad()
    def write_gradients_(self, parameters: Sequence[Any], gradients: Sequence[Tensor]) -> None:
        """Write this rank's ranges of the gradients. See `Parts`."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.set_full_hp_grad(gradient)  # `safe_set_full_grad` would prefer a leftover `grad`


def _range(own: Any, whole: Tensor) -> Tensor:
    """Return the range of a flat parameter whose master weights are on this rank."""
    address = own.lp_fragment_address
    return whole.narrow(0, address.start, address.numel)


class Shards:
    """ZeRO-3: each rank has a shard of equal size of each parameter, its master weights and its gradient.

    The last shard is padded. Between uses, a parameter is empty, unless it is smaller than
    ``stage3_param_persistence_threshold``.
    """

    splits = True

    @torch.no_grad()
    def read(self, parameters: Sequence[Any], *, gradients: bool, what: str) -> tuple[list[Tensor], Tensor]:
        """Gather the shards. See `Parts`."""
        utils = _accessors()
        trained = [p for p in parameters if gradients and p.requires_grad]
        shares = [_master(p) for p in parameters]
        shares += [utils.safe_get_local_grad(p) for p in trained]
        sizes = [share.numel() for share in shares]
        everybody = [found.split(sizes) for found in group.gather(flat(shares), what)]
        pieces = zip(*everybody, strict=True)  # for each parameter, the shards of all ranks
        whole = [torch.cat(own)[: p.ds_numel] for p, own in zip((*parameters, *trained), pieces, strict=True)]
        values = [
            value.view(p.ds_shape) if p.requires_grad else value.view(p.ds_shape).to(p.dtype)
            for p, value in zip(parameters, whole, strict=False)
        ]
        return values, torch.cat([whole[0].new_zeros(0), *whole[len(parameters) :]])

    @torch.no_grad()
    def write_(self, parameters: Sequence[Any], values: Sequence[Tensor]) -> None:
        """Write this rank's shards of the master weights and of the parameters. See `Parts`."""
        utils, number = _accessors(), rank()
        for parameter, value in zip(parameters, values, strict=True):
            share = _share(parameter, value, number)
            utils.safe_set_local_fp32_param(parameter, share)  # does nothing for a frozen parameter
            parameter.ds_tensor.data.copy_(share)
            if parameter.ds_status.name == "AVAILABLE":
                parameter.data.copy_(value)

    @torch.no_grad()
    def write_gradients_(self, parameters: Sequence[Any], gradients: Sequence[Tensor]) -> None:
        """Write this rank's shards of the gradients. See `Parts`."""
        utils, number = _accessors(), rank()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            utils.safe_set_local_grad(parameter, _share(parameter, gradient, number))


def _master(parameter: Any) -> Tensor:
    """Return this rank's flat shard of a parameter's master weights; a frozen parameter has only its own shard."""
    local: Tensor | None = _accessors().safe_get_local_fp32_param(parameter) if parameter.requires_grad else None
    return parameter.ds_tensor if local is None else local


def _share(parameter: Any, whole: Tensor, number: int) -> Tensor:
    """Return rank ``number``'s flat shard of ``whole``, padded with zeros."""
    size = parameter.ds_tensor.numel()
    share = whole.reshape(-1)[number * size : (number + 1) * size]
    missing = size - share.numel()
    return torch.cat([share, share.new_zeros(missing)]) if missing else share


def _accessors() -> Any:
    return importlib.import_module("deepspeed.utils")  # DeepSpeed is imported already


def unflatten(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Split a vector into views with the shapes of the whole parameters."""
    shapes = [whole_shape(parameter) for parameter in parameters]
    return [piece.view(shape) for piece, shape in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)]
