"""DTensors of FSDP2: gather full tensors from all ranks, and read or write this rank's shards."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import StepError
from tunerkit_distributed import group, torch_private
from tunerkit_distributed.shards import Cut, joined, longest, packed


@attrs.define(eq=False)
class Part:
    """One sharded parameter.

    Attributes:
        parameter: The DTensor. Any: torch.distributed.tensor is imported late.
        places: (module, parameter name) of all modules with this parameter.
        cut: The shape and the split of the parameter.
        group: The process group over which the parameter is sharded.
        number: The index of this rank's shard.
        stand_in: The gathered parameter, while it replaces the DTensor.
        grad: The DTensor's gradient before the replacement.
        hooks: FSDP2's hooks after ``load_state_dict``, by module; they are removed during the replacement.
    """

    parameter: Any
    places: list[tuple[nn.Module, str]]
    cut: Cut
    group: Any
    number: int
    stand_in: nn.Parameter | None = None
    grad: Tensor | None = None
    hooks: list[tuple[nn.Module, dict[int, Any]]] = attrs.field(factory=list)

    @property
    def kind(self) -> tuple[object, ...]:
        """A key for grouping: parameters with equal keys are gathered in one collective."""
        return self.group, self.parameter.dtype, local(self.parameter).device

    def stand_in_(self, value: Tensor, grad: Tensor | None) -> int:
        """Replace the DTensor by a gathered parameter; return the new parameter's id."""
        self.stand_in = nn.Parameter(value, requires_grad=self.parameter.requires_grad)
        self.stand_in.grad = grad
        self.grad = self.parameter.grad
        self._put_(self.stand_in)
        self.hooks = [(module, torch_private.take_load_hooks_(module)) for module, _ in self.places]
        return id(self.stand_in)

    def put_back_(self) -> Tensor:
        """Restore the DTensor; return the parameter that it replaces, which the block may have exchanged."""
        module, name = self.places[0]
        left = torch_private.own_parameters(module)[name]
        self._put_(self.parameter)
        for holder, hooks in self.hooks:
            torch_private.put_load_hooks_(holder, hooks)
        return self.parameter if left is None else left

    def _put_(self, parameter: nn.Parameter) -> None:
        for module, name in self.places:
            torch_private.own_parameters(module)[name] = parameter

    def write_back_(self, left: Tensor, *, gradients: bool) -> None:
        """Copy this rank's shard of ``left``, and of its gradient if asked, into the DTensor."""
        local(self.parameter).copy_(self.cut.part(left, self.number))
        if not gradients:
            return
        if left.grad is None:
            self.parameter.grad = None
        elif self.grad is None:
            self.parameter.grad = torch.empty_like(self.parameter)
            local(self.parameter.grad).copy_(self.cut.part(left.grad, self.number))
        else:  # into the same tensor: the block may have withheld that gradient from the step
            local(self.grad).copy_(self.cut.part(left.grad, self.number))


@contextmanager
def gathered(module: nn.Module) -> Iterator[Callable[[str, Tensor], Tensor]]:
    """Inside the block, the parameters below ``module`` are gathered, for reading. All ranks must call it.

    Returns:
        A context manager. It yields a function (parameter name, full tensor of the parameter's shape) -> this rank's
        shard of the tensor, as a copy; if the parameter is not sharded, the tensor itself.

    Raises:
        StepError: A parameter is sharded along several dimensions.
    """
    shards = [part_of(parameter, places) for parameter, places in owners([module]) if is_split(parameter)]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    cuts = {names[id(shard.parameter)]: shard for shard in shards}
    with torch.no_grad():
        values = whole_values([local(shard.parameter) for shard in shards], shards, "the base's parameters")
    for shard, value in zip(shards, values, strict=True):
        shard.stand_in_(value, None)

    def part(name: str, whole: Tensor) -> Tensor:
        shard = cuts.get(name)
        return whole if shard is None else shard.cut.part(whole, shard.number).clone()

    try:
        yield part
    finally:
        for shard in shards:
            shard.put_back_()


def gathered_tensors(tensors: Sequence[Tensor], what: str) -> list[Tensor]:
    """Gather DTensors that are not parameters, such as an optimizer's state. All ranks must call this."""
    shards = [part_of(tensor, []) for tensor in tensors]
    return whole_values([local(tensor) for tensor in tensors], shards, what)


def cut_of(tensor: Tensor) -> tuple[Cut, int]:
    """Return the split of a DTensor, and the index of this rank's shard."""
    shard = part_of(tensor, [])
    return shard.cut, shard.number


def shard_like(parameter: Any, part: Tensor) -> Tensor:
    """Make a DTensor from this rank's shard, sharded like ``parameter``."""
    made = torch.empty_like(parameter, dtype=part.dtype)
    local(made).copy_(part)
    return made


def local_part(parameter: Tensor) -> Tensor:
    """Return this rank's shard of a parameter, as a view; the parameter itself if it is not sharded."""
    return local(parameter) if is_split(parameter) else parameter


def reshard_(model: nn.Module) -> None:
    """Reshard parameters that FSDP2 leaves gathered: the root module's, between a forward and the next backward."""
    fully: Any = sys.modules.get("torch.distributed.fsdp")  # importing it takes long
    for module in () if fully is None else model.modules():
        if isinstance(module, fully.FSDPModule):
            module.reshard()


def is_split(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    # If nobody has imported the module, no DTensor exists. Importing it takes long.
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def owners(slots: Sequence[nn.Module]) -> list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Return each parameter below ``slots`` once, with the (module, name) pairs of its modules."""
    modules = {id(module): module for slot in slots for module in slot.modules()}
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in modules.values():
        for name, parameter in torch_private.own_parameters(module).items():
            if parameter is not None:
                found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(found.values())


def part_of(parameter: Any, places: list[tuple[nn.Module, str]]) -> Part:
    """Read a DTensor's layout. Raises `StepError` unless it is sharded along exactly one dimension."""
    from torch.distributed.tensor import Shard

    mesh, placements = parameter.device_mesh, parameter.placements
    cut_along = [number for number, placement in enumerate(placements) if type(placement) is Shard]
    others = [placement for placement in placements if type(placement) is not Shard and not placement.is_replicate()]
    if len(cut_along) != 1 or others:
        raise StepError(
            f"an adapter's parameter of shape {tuple(parameter.shape)} has the placements {placements}, but adapters "
            "can be trained only if sharded along one dimension, over one dimension of the mesh. Leave them out of "
            "tensor parallelism"
        )
    along = cut_along[0]
    cut = Cut(tuple(parameter.shape), placements[along].dim, mesh.size(along))
    number = mesh.get_local_rank(along)
    if tuple(local(parameter).shape) != cut.part_shape(number):
        raise StepError(
            f"process {number} has a shard {tuple(local(parameter).shape)} of a parameter of shape {cut.shape}; "
            f"expected {cut.part_shape(number)}: this release of torch shards differently; train in one process"
        )
    return Part(parameter, places, cut, mesh.get_group(along), number)


def local(tensor: Any) -> Tensor:
    """Return this rank's shard of a DTensor, as a view."""
    with torch.no_grad():
        own: Tensor = tensor.to_local()
    return own


def whole_values(parts: Sequence[Tensor], shards: Sequence[Part], what: str) -> list[Tensor]:
    """Gather full tensors from all ranks' ``parts``, laid out like ``shards``; one all-gather per `Part.kind`."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, shard in enumerate(shards):
        kinds.setdefault(shard.kind, []).append(index)
    whole: dict[int, Tensor] = {}
    for members in kinds.values():
        cuts = [shards[index].cut for index in members]
        vector = packed([parts[index] for index in members], longest(cuts))
        whole.update(zip(members, joined(_exchanged(vector, shards[members[0]], what), cuts), strict=True))
    return [whole[index] for index in range(len(shards))]


def whole_gradients(shards: Sequence[Part]) -> list[Tensor | None]:
    """Gather the gradients; None for a frozen parameter, and for a parameter without a gradient on any rank.

    Raises:
        StepError: Only some ranks have a gradient for a parameter.
    """
    trained = [shard for shard in shards if shard.parameter.requires_grad]
    parts, flags = [], []
    for shard in trained:
        own, grad = local(shard.parameter), shard.parameter.grad
        parts.append(torch.zeros_like(own) if grad is None else local(grad).to(own))
        # Every rank sends the same number of values, whether it has a gradient or not.
        flags.append(own.new_full((1,), grad is not None))
    flag_cuts = [attrs.evolve(shard, cut=Cut((shard.cut.processes,), 0, shard.cut.processes)) for shard in trained]
    found = whole_values([*parts, *flags], [*trained, *flag_cuts], "the adapter's gradients")
    grads, used = found[: len(trained)], _on_host(found[len(trained) :])
    missing = sum(any(each) and not all(each) for each in used)
    if missing:
        raise StepError(
            f"{missing} parameters of the adapter have a gradient in some processes and none in others: every process "
            "must take a backward before each step"
        )
    by_shard = {id(shard): grad if any(each) else None for shard, grad, each in zip(trained, grads, used, strict=True)}
    return [by_shard.get(id(shard)) for shard in shards]


def _on_host(flags: Sequence[Tensor]) -> list[list[float]]:
    """Copy short vectors to the host in one transfer, as lists."""
    if not flags:
        return []
    numbers: Iterator[float] = iter(torch.cat([flag.float().to(flags[0].device) for flag in flags]).tolist())
    return [list(itertools.islice(numbers, len(flag))) for flag in flags]


def _exchanged(vector: Tensor, shard: Part, what: str) -> Tensor:
    """All-gather a vector over the ranks of ``shard``; return (ranks, length), on the vector's device."""
    # CPU offload: the shards lie on the CPU, and the process group may only know the mesh's devices.
    own = vector.to(shard.parameter.device_mesh.device_type)
    return torch.stack(group.gather(own, what, within=shard.group)).to(vector.device)
