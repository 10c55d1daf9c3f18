"""Replicated adapters: their gradients are averaged over all ranks at the end of each backward."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.errors import StepError, warn
from tunerkit.plugin import Engine, Tuner
from tunerkit.plugin.engines import Removable
from tunerkit_distributed import group, torch_private
from tunerkit_distributed.agreement import refuse_differing, starts_alike, take_from_first_
from tunerkit_distributed.barrier import Barrier
from tunerkit_distributed.deepspeed_names import is_of_deepspeed
from tunerkit_distributed.flat import flat, unflatten_
from tunerkit_distributed.holdings import is_sharded
from tunerkit_distributed.position import Position
from tunerkit_distributed.reducers import Reducers
from tunerkit_distributed.under_ddp import UnderDdp
from tunerkit_distributed.writing import written_once

OF_DEEPSPEED = (
    "DeepSpeed trains this adapter with its own optimizer: pass the engine or the optimizer from deepspeed.initialize "
    "to tunerkit.attach"
)
_GONE = "its DistributedDataParallel is gone, and nothing averages its gradients: attach again"


class Replicated(Engine):
    """Plain data parallelism, DDP, and FSDP2 with the adapters in its ``ignored_params``.

    At the end of each backward, before any clipping, one all-reduce averages the gradients of all adapters. It also
    sums the number of ranks with a gradient for each parameter, and each rank's `Position`.

    DDP averages gradients itself, so there is only a barrier, at the first gradient of a backward. The first backward
    searches for the DDP, since a model does not refer to it and it may be built after `attach`. FSDP2 gathers the base
    in forwards and backwards, so each of them has a barrier.

    Args:
        expected: Whether the user passed ``data_parallel=True``. Otherwise the first average triggers a warning.
    """

    is_shared = True

    def __init__(self, *, expected: bool = False) -> None:
        self._announced = expected
        # Weak: the hooks of the parameters refer to this, and a model must be freed when its user drops it.
        self._held: dict[str, list[weakref.ref[nn.Parameter]]] = {}
        self._reducers = Reducers()
        self._in_ddp: bool | None = None  # None: not looked for yet
        self._queued = -1  # the number of the backward that ends with an average
        self._pending = self._paused = False
        self._steps = self._backwards = self._averages = 0
        self._seen: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._checked: frozenset[int] = frozenset()
        self._training = 0
        self._under_ddp = UnderDdp(self._reducers.found)
        self._barrier = Barrier()

    @property
    def name(self) -> str:
        """The engine's name in messages."""
        return "DistributedDataParallel" if self._in_ddp else "data parallel with replicated adapters"

    @property
    def fixed_shapes(self) -> str | None:
        """The reason why parameters must not change shape; None if they may."""
        if self._in_ddp and not self._reducers.found():
            return _GONE
        return None if self._in_ddp is False else self._reducers.obstacle()

    @property
    def is_writer(self) -> bool:
        """Whether this is rank 0."""
        return group.rank() == 0

    def begin_(self, adapters: Sequence[Tuner], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Compare the adapters, broadcast their initial values from rank 0, and register the averaging hooks."""
        self._training = refuse_differing(adapters, optimizer)
        handles: dict[str, tuple[Removable, ...]] = {}
        for tuner in adapters:
            own = list(tuner.parameters())
            if starts_alike(tuner):
                self.agree_(own, f"the start of adapter {tuner.name!r}")
            self._held[tuner.name] = list(map(weakref.ref, own))
            self._reducers.add_([tuner.model])
            _engines.add(self)
            trained = (parameter for parameter in own if parameter.requires_grad)
            hooks = [parameter.register_post_accumulate_grad_hook(self._queue) for parameter in trained]
            hooks += [p.register_post_accumulate_grad_hook(self._queue_other) for p in _others(tuner.model, own)]
            handles[tuner.name] = (*hooks, _Membership(self._held, tuner.name))
        self._reducers.follow_()
        members = self._open_barrier(handles, adapters[0].model)
        return {name: (*registered, members[name]) for name, registered in handles.items()}

    def _open_barrier(self, names: Iterable[str], model: nn.Module) -> Mapping[str, Removable]:
        """Open the barrier for FSDP2 if the base is sharded, else the one for DDP."""
        if not any(map(is_sharded, model.parameters())):
            return self._under_ddp.open_(names, model, self._training)
        members = self._barrier.open_(names, model, self._training)
        self._barrier.watch_(model, forwards=True)  # FSDP2 gathers the base in forwards and backwards
        return members

    def before_step_(self, optimizer: Optimizer) -> None:
        """Average pending gradients; reject a step if ranks are at different points or gradients are not averaged."""
        if self._look_for_ddp():
            if not self._under_ddp.is_there():
                raise StepError(f"adapters {', '.join(self._held)}: {_GONE}")
            self._under_ddp.before_step_(optimizer)
            return
        self._barrier.before_step_(optimizer)
        self._refuse_strangers(optimizer)
        if self._pending:  # the last backward was to be followed by another one: too late for clipping, but averaged
            self._average_(backward=True)
        elif self._seen.get(optimizer, 0) == self._averages:
            self._average_(backward=False)
        self._seen[optimizer] = self._averages
        self._steps, self._backwards = self._steps + 1, 0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside the block, backwards do not average; the next backward after it does. See `Engine`."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def resized_(self) -> None:
        """Rebuild DDP's reducer. See `Engine`."""
        self._reducers.rebuild_()

    def write_once(self, place: Path, content: str, write: Callable[[], Path]) -> Path:
        """See `Engine`."""
        return written_once(self, place, content, write)

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Broadcast from rank 0, in one collective for each dtype and device. See `Engine`."""
        if self._in_ddp:
            self._under_ddp.before_agreeing(what)
        take_from_first_(tensors, what)

    def holds(self) -> Iterator[nn.Parameter]:
        """Yield the adapters' parameters, including frozen ones."""
        held = (ref() for own in self._held.values() for ref in own)
        return (parameter for parameter in held if parameter is not None)

    def _look_for_ddp(self) -> bool:
        """Whether DDP averages the gradients; found once, since DDP exists before the first backward."""
        if self._in_ddp is None:
            self._in_ddp = bool(self._reducers.follow_())
        return self._in_ddp

    def _queue(self, parameter: Tensor) -> None:
        """Gradient hook of an adapter's parameter: average at the end of this backward, unless DDP averages."""
        running = torch_private.running_backward()
        if self._queued == running:
            return
        self._queued = running
        if self._look_for_ddp():
            self._under_ddp.at_backward()
        else:
            torch_private.after_backward(self._after_backward)

    def _queue_other(self, parameter: Tensor) -> None:
        """Gradient hook of another trained parameter: needed for DDP's barrier if a batch uses no adapter."""
        if self._look_for_ddp():
            self._queue(parameter)

    def _after_backward(self) -> None:
        self._pending = True
        self._backwards += 1
        if not (self._paused or _is_accumulating()):
            self._average_(backward=True)

    @torch.no_grad()
    def _average_(self, *, backward: bool) -> None:
        """Average the gradients over all ranks, in one all-reduce."""
        self._pending = False
        self._averages += 1
        held = list(self.holds())  # frozen ones too: every rank must send the same number of values
        if not held:
            return
        self._announce()
        used = [parameter.grad is not None for parameter in held]
        grads = [_zeros(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad for p in held]
        doing = f"backward {self._backwards}" if backward else "and it steps without a backward"
        position = Position(self._steps, self._backwards, not backward, self._training, [*self._held], doing)
        flags = [*used, *position.numbers()]
        vector = flat([*grads, torch.tensor(flags, dtype=torch.float32, device=grads[0].device)])
        group.reduce_(vector, f"the gradients of step {self._steps + 1}")
        averages, counts = vector[: -len(flags)], vector[-len(flags) :].tolist()
        position.refuse_mismatch(counts[len(used) :])
        kept = [(p, grad) for p, grad, count in zip(held, grads, counts, strict=False) if count and p.requires_grad]
        averages.div_(group.processes())
        unflatten_(averages, grads)
        for parameter, grad in kept:
            if parameter.grad is not grad:
                parameter.grad = grad

    def _refuse_strangers(self, optimizer: Optimizer) -> None:
        """Raise `StepError` if trained parameters belong to no attached adapter, so that nothing averages them."""
        trained = frozenset(id(p) for each in optimizer.param_groups for p in each["params"] if p.requires_grad)
        if trained <= self._checked:
            return
        if any(map(is_of_deepspeed, self.holds())):
            raise StepError(OF_DEEPSPEED)
        others = _strangers(optimizer, self._reducers.models)
        if others:
            raise StepError(
                f"{len(others)} trained parameters belong to no attached adapter (shapes: "
                f"{few([str(tuple(p.shape)) for p in others], shown=3)}), and nothing averages their gradients over "
                f"{group.processes()} processes: attach all adapters, freeze the rest, name its modules in "
                "train_modules, or put the model into DistributedDataParallel"
            )
        self._checked |= trained

    def _announce(self) -> None:
        if self._announced:
            return
        self._announced = True
        if group.rank() == 0:
            warn(
                f"{group.processes()} processes train these adapters, and nothing else averages their gradients, so "
                "tunerkit does, after each backward. To confirm this and silence the warning, attach with "
                "data_parallel=True. To train independent adapters, attach with data_parallel=False"
            )


@attrs.frozen(eq=False)
class _Membership:
    """The handle that excludes one adapter from the averages; all ranks must call it at the same point."""

    parameters: MutableMapping[str, list[weakref.ref[nn.Parameter]]]
    name: str

    def remove(self) -> None:
        """Exclude the adapter from the averages."""
        self.parameters.pop(self.name, None)


_engines: "weakref.WeakSet[Replicated]" = weakref.WeakSet()


def _strangers(optimizer: Optimizer, models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return trained, unsharded parameters of the optimizer and models that belong to no attached adapter."""
    known = {id(parameter) for engine in _engines for parameter in engine.holds()}
    trained = [parameter for each in optimizer.param_groups for parameter in each["params"]]
    trained += [parameter for model in models for parameter in model.parameters()]
    found = {id(p): p for p in trained if p.requires_grad and id(p) not in known and not is_sharded(p)}
    return list(found.values())


def _others(model: nn.Module, known: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the model's trained, unsharded parameters that are not in ``known``."""
    ids = set(map(id, known))
    return [p for p in model.parameters() if p.requires_grad and id(p) not in ids and not is_sharded(p)]


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter)


def _is_accumulating() -> bool:
    """Whether accelerate accumulates gradients, so that more backwards precede the next optimizer step."""
    state = sys.modules.get("accelerate.state")
    shared: dict[str, Any] = {} if state is None else state.GradientState._shared_state
    return not shared.get("sync_gradients", True)


def few(names: Sequence[str], *, shown: int) -> str:
    """Return the first names and the number of the others, for a message: ``a, b and 3 more``."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
