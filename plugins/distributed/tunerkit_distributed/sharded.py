"""Adapters that FSDP2 has sharded: each process holds a part of every parameter, as a DTensor."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.errors import StepError
from tunerkit.hooks import Engine, Pieces, Removable, whole_pieces
from tunerkit.injection import slots_in
from tunerkit.plugin import Tuner
from tunerkit_distributed import group
from tunerkit_distributed.agreement import refuse_differing, starts_alike, take_from_first_
from tunerkit_distributed.dtensors import (
    Part,
    is_split,
    local,
    owners,
    part_of,
    reshard_,
    whole_gradients,
    whole_values,
)
from tunerkit_distributed.meeting import Meeting
from tunerkit_distributed.pieces import are_cut_alike, pieces_of
from tunerkit_distributed.writing import written_once

_FIXED = (
    "FSDP2 has cut its parameters into shards of fixed sizes; to let adapters shrink, pass ignored_params="
    "set(tunerkit.tuner(model).parameters()) to fully_shard"
)
_ADVICE = (
    "Pass none of the adapter's parameters to fully_shard as ignored_params, or all of them: "
    "set(tunerkit.tuner(model).parameters())"
)


class Sharded(Engine):
    """FSDP2 with adapters that are sharded like the base.

    FSDP2 averages the gradients itself. A method sees whole parameters inside `whole`: plain stand-ins, gathered from
    all processes. Afterwards each process writes its part of them back.

    Args:
        model: The model that was passed to ``fully_shard``, or one around it.
    """

    is_shared = True
    gives_pieces = False  # until `begin_` has looked at the adapters

    def __init__(self, model: nn.Module) -> None:
        # Weak: the optimizer's hooks hold this, and a model must be freed when its user drops it.
        self._model = weakref.ref(model)
        self._slots: list[weakref.ref[nn.Module]] = []
        self._meeting = Meeting()
        self._standing: dict[int, Tensor] = {}  # inside `whole`: the parameters outside of it, by the stand-in's id

    @property
    def name(self) -> str:
        """What messages call it."""
        return "FSDP2 with sharded adapters"

    @property
    def fixed_shapes(self) -> str:
        """Why a parameter's shape must not change."""
        return _FIXED

    @property
    def splits(self) -> bool:
        """Whether a process holds only a part: it does."""
        return True

    @property
    def is_writer(self) -> bool:
        """Whether this is process 0."""
        return group.rank() == 0

    def begin_(self, adapters: Sequence[Tuner], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Compare the adapters of all processes. See `Engine`.

        No start is sent around: a whole parameter is the parts that the processes hold. If they wrapped without a seed,
        it is put together from several random starts, and is a random start itself.
        """
        number = refuse_differing(adapters, optimizer)
        slots = [slot for tuner in adapters for _, slot in slots_in(tuner)]
        found = self._found(slots)
        for tuner in adapters:
            if not starts_alike(tuner) and not tuner.progress.loaded and tuner.progress.seed is None:
                raise StepError(
                    f"adapter {tuner.name!r} was wrapped without a seed, so its shards come from different starts, "
                    "and the base was changed to fit them: pass a seed to tunerkit.wrap"
                )
        self._slots = list(map(weakref.ref, slots))
        self.gives_pieces = are_cut_alike([part.parameter for part in found])
        seats = self._meeting.open_((tuner.name for tuner in adapters), adapters[0].model, number)
        model = self._model()
        if model is not None:
            self._meeting.watch_(model, forwards=True)
        return {name: (seat,) for name, seat in seats.items()}

    def before_step_(self, optimizer: Optimizer) -> None:
        """Meet the other processes: a method may gather parameters next. See `Meeting.before_step_`."""
        self._meeting.before_step_(optimizer, always=True)

    @contextmanager
    def whole(self, slots: Sequence[nn.Module], *, gradients: bool) -> Iterator[Callable[[Tensor], Tensor]]:
        """Put whole stand-ins where the sharded parameters are. See `Engine`.

        It costs one all-gather of the parameters for each dtype, and one of their gradients. Inside another such block
        it does nothing.

        Raises:
            StepError: Some parameters are sharded and others are not; the block has changed a shape; or only some
                processes have a gradient.
        """
        if self._standing:
            yield self._outside
            return
        shards = self._found(slots)
        with torch.no_grad():
            values = whole_values([local(shard.parameter) for shard in shards], shards, "the adapter's parameters")
            grads = whole_gradients(shards) if gradients else [None] * len(shards)
        for shard, value, grad in zip(shards, values, grads, strict=True):
            self._standing[shard.stand_in_(value, grad)] = shard.parameter
        try:
            yield self._outside
        finally:
            self._standing.clear()
            left = [shard.put_back_() for shard in shards]
            _refuse_resized(shards, left)
            with torch.no_grad():
                for shard, now in zip(shards, left, strict=True):
                    shard.write_back_(now, gradients=gradients)

    def _outside(self, parameter: Tensor) -> Tensor:
        return self._standing.get(id(parameter), parameter)

    def reshard_(self) -> None:
        """Let FSDP2 cut its root again, which it leaves whole after a forward without a backward. See `Engine`."""
        slots = [slot for ref in self._slots if (slot := ref()) is not None]
        model = self._model()
        if model is not None and not all(is_split(p) for slot in slots for p in slot.parameters()):
            reshard_(model)

    def pieces(self, parameters: Sequence[nn.Parameter]) -> Pieces:
        """Return this process's pieces; inside `whole` all of the stand-ins. See `Engine`."""
        return pieces_of(parameters) if all(map(is_split, parameters)) else whole_pieces(parameters)

    def write_once(self, place: Path, content: str, write: Callable[[], Path]) -> Path:
        """See `Engine`."""
        return written_once(self, place, content, write)

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Broadcast from process 0. See `Engine`."""
        take_from_first_(tensors, what)

    def _found(self, slots: Sequence[nn.Module]) -> list[Part]:
        """Find the parameters below ``slots``, each once. Raises `StepError` if only some are sharded."""
        found = owners(slots)
        if not all(is_split(parameter) for parameter, _ in found):
            model = self._model()
            if model is not None:
                reshard_(model)
            found = owners(slots)
        plain = sum(not is_split(parameter) for parameter, _ in found)
        if plain:
            raise StepError(
                f"{plain} of the adapter's {len(found)} parameters are whole in each process, and FSDP2 has sharded "
                f"the others, so they would not be trained alike. {_ADVICE}"
            )
        return [part_of(parameter, places) for parameter, places in found]


def _refuse_resized(shards: Sequence[Part], left: Sequence[Tensor]) -> None:
    for shard, now in zip(shards, left, strict=True):
        if tuple(now.shape) != shard.cut.shape:
            raise StepError(
                f"a parameter of shape {shard.cut.shape} has become one of {tuple(now.shape)}, which is not kept: "
                f"{_FIXED}"
            )
