"""The engine for adapters that FSDP2 has sharded: each rank has a shard of every parameter, as a DTensor."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.errors import StepError
from tunerkit.plugin import Engine, Pieces, Tuner, whole_pieces
from tunerkit.plugin.engines import Removable, slots_in
from tunerkit_distributed import group
from tunerkit_distributed.agreement import refuse_differing, starts_alike, take_from_first_
from tunerkit_distributed.barrier import Barrier
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

    FSDP2 averages the gradients itself. Inside `whole`, gathered plain tensors replace the parameters. Afterwards, each
    rank copies its shard of them back.

    Args:
        model: The model that was passed to ``fully_shard``, or a module around that.
    """

    is_shared = True
    gives_pieces = False  # until `begin_` has looked at the adapters

    def __init__(self, model: nn.Module) -> None:
        # Weak: the optimizer's hooks refer to this, and a model must be freed when its user drops it.
        self._model = weakref.ref(model)
        self._slots: list[weakref.ref[nn.Module]] = []
        self._barrier = Barrier()
        self._replaced: dict[int, Tensor] = {}  # inside `whole`: the sharded parameter by the id of the gathered one

    @property
    def name(self) -> str:
        """The engine's name in messages."""
        return "FSDP2 with sharded adapters"

    @property
    def fixed_shapes(self) -> str:
        """The reason why parameters must not change shape."""
        return _FIXED

    @property
    def splits(self) -> bool:
        """True: each rank has only a shard of an adapter."""
        return True

    @property
    def is_writer(self) -> bool:
        """Whether this is rank 0."""
        return group.rank() == 0

    def begin_(self, adapters: Sequence[Tuner], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Compare the adapters of all ranks. See `Engine`.

        Initial values are not broadcast: without a seed, each rank's shards come from its own random values, and
        together they are random initial values too.
        """
        number = refuse_differing(adapters, optimizer)
        slots = [slot for tuner in adapters for _, slot in slots_in(tuner)]
        found = self._found(slots)
        for tuner in adapters:
            if not starts_alike(tuner) and not tuner.progress.loaded and tuner.progress.seed is None:
                raise StepError(
                    f"adapter {tuner.name!r} was wrapped without a seed, so its shards have different initial values, "
                    "and each process changed the base to fit its own: pass a seed to tunerkit.wrap"
                )
        self._slots = list(map(weakref.ref, slots))
        self.gives_pieces = are_cut_alike([part.parameter for part in found])
        members = self._barrier.open_((tuner.name for tuner in adapters), adapters[0].model, number)
        model = self._model()
        if model is not None:
            self._barrier.watch_(model, forwards=True)
        return {name: (member,) for name, member in members.items()}

    def before_step_(self, optimizer: Optimizer) -> None:
        """Wait for all ranks, since a method's hooks may gather parameters next. See `Barrier.before_step_`."""
        self._barrier.before_step_(optimizer, always=True)

    @contextmanager
    def whole(self, slots: Sequence[nn.Module], *, gradients: bool) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside the block, replace the sharded parameters by gathered ones. See `Engine`.

        This takes one all-gather of the parameters for each dtype, and one of the gradients. A nested block does
        nothing.

        Raises:
            StepError: Some parameters are sharded and others are not; the block has changed a shape; or only some
                ranks have a gradient.
        """
        if self._replaced:
            yield self._outside
            return
        shards = self._found(slots)
        with torch.no_grad():
            values = whole_values([local(shard.parameter) for shard in shards], shards, "the adapter's parameters")
            grads = whole_gradients(shards) if gradients else [None] * len(shards)
        for shard, value, grad in zip(shards, values, grads, strict=True):
            self._replaced[shard.stand_in_(value, grad)] = shard.parameter
        try:
            yield self._outside
        finally:
            self._replaced.clear()
            left = [shard.put_back_() for shard in shards]
            _refuse_resized(shards, left)
            with torch.no_grad():
                for shard, now in zip(shards, left, strict=True):
                    shard.write_back_(now, gradients=gradients)

    def _outside(self, parameter: Tensor) -> Tensor:
        return self._replaced.get(id(parameter), parameter)

    def reshard_(self) -> None:
        """Reshard FSDP2's root module, which stays gathered after a forward without a backward. See `Engine`."""
        slots = [slot for ref in self._slots if (slot := ref()) is not None]
        model = self._model()
        if model is not None and not all(is_split(p) for slot in slots for p in slot.parameters()):
            reshard_(model)

    def pieces(self, parameters: Sequence[nn.Parameter]) -> Pieces:
        """Return this rank's shards; inside `whole`, the gathered parameters. See `Engine`."""
        return pieces_of(parameters) if all(map(is_split, parameters)) else whole_pieces(parameters)

    def write_once(self, place: Path, content: str, write: Callable[[], Path]) -> Path:
        """See `Engine`."""
        return written_once(self, place, content, write)

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Broadcast from rank 0. See `Engine`."""
        take_from_first_(tensors, what)

    def _found(self, slots: Sequence[nn.Module]) -> list[Part]:
        """Return each parameter below ``slots`` once. Raises `StepError` if some are not sharded."""
        found = owners(slots)
        if not all(is_split(parameter) for parameter, _ in found):
            model = self._model()
            if model is not None:
                reshard_(model)
            found = owners(slots)
        plain = sum(not is_split(parameter) for parameter, _ in found)
        if plain:
            raise StepError(
                f"FSDP2 has sharded only some of the adapter's {len(found)} parameters: {plain} are not sharded, and "
                f"nothing would average their gradients. {_ADVICE}"
            )
        return [part_of(parameter, places) for parameter, places in found]


def _refuse_resized(shards: Sequence[Part], left: Sequence[Tensor]) -> None:
    for shard, now in zip(shards, left, strict=True):
        if tuple(now.shape) != shard.cut.shape:
            raise StepError(
                f"a parameter of shape {shard.cut.shape} has become one of {tuple(now.shape)}, and the change is "
                f"discarded: {_FIXED}"
            )
