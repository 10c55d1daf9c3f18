"""The engine for DeepSpeed's ZeRO, stages 1, 2 and 3: it gathers adapters around a step, whose hooks it calls."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.errors import StepError
from tunerkit.plugin import Engine, Tuner
from tunerkit.plugin.engines import Removable, is_named, slots_in
from tunerkit_distributed import torch_private
from tunerkit_distributed.agreement import refuse_differing, starts_alike, take_from_first_
from tunerkit_distributed.barrier import Barrier
from tunerkit_distributed.deepspeed_names import (
    DEEPSPEED_ENGINE,
    DEEPSPEED_OPTIMIZER,
    DEEPSPEED_WRAPPERS,
    ZERO_OPTIMIZER,
    is_of_deepspeed,
)
from tunerkit_distributed.group import rank
from tunerkit_distributed.holdings import is_sharded
from tunerkit_distributed.writing import written_once
from tunerkit_distributed.zero_parts import parts_of, trained_by, unflatten

_FIXED = "DeepSpeed keeps all parameters in flat buffers, so their shapes must not change"


def engine_of(candidate: object) -> "ZeroEngine | None":
    """Return an engine if ``candidate`` is DeepSpeed's.

    Args:
        candidate: The argument of attach: a DeepSpeedEngine, its optimizer, or accelerate's wrapper of either.

    Returns:
        The engine; None for anything else, such as a torch optimizer.

    Raises:
        StepError: DeepSpeed runs without ZeRO, or stores the parameters in an unsupported way.
    """
    own: Any = candidate
    for kind, attribute in DEEPSPEED_WRAPPERS.items():
        if is_named(type(own), kind):
            own = getattr(own, attribute)
    of_engine = is_named(type(own), DEEPSPEED_ENGINE)
    zero = own.optimizer if of_engine else own
    if is_named(type(zero), ZERO_OPTIMIZER):
        return ZeroEngine(ZeroSteps.of(zero))
    if of_engine or is_named(type(zero), DEEPSPEED_OPTIMIZER):
        raise StepError(
            f"DeepSpeed trains with {type(zero).__name__}, without ZeRO: set the stage of zero_optimization to 1, 2 or "
            "3, or train with DistributedDataParallel"
        )
    return None


class ZeroSteps(Optimizer):
    """A torch optimizer around DeepSpeed's, whose ``step`` calls the step hooks once for each step of DeepSpeed.

    DeepSpeed's own class is not a torch optimizer, and its inner optimizer steps flat buffers, several times in a step.
    After `install_`, DeepSpeed's engine calls this ``step``, only when gradient accumulation is complete.

    Args:
        zero: DeepSpeed's optimizer.
    """

    def __init__(self, zero: Any) -> None:
        super().__init__(trained_by(zero), {})
        self.zero = zero
        self.has_moved = False
        self._step: Callable[..., Any] = zero.step
        self._users: set[object] = set()

    @staticmethod
    def of(zero: Any) -> "ZeroSteps":
        """Return the `ZeroSteps` that is installed on DeepSpeed's optimizer, or a new one."""
        installed = getattr(vars(zero).get("step"), "__self__", None)
        return installed if isinstance(installed, ZeroSteps) else ZeroSteps(zero)

    def install_(self) -> Removable:
        """Make DeepSpeed call `run` in place of its ``step``, until every returned handle is removed."""
        use = _Use(self)
        self._users.add(use)
        self.zero.step = self.run
        return use

    def leave_(self, use: object) -> None:
        """Remove a use; removing the last one restores DeepSpeed's own ``step``."""
        self._users.discard(use)
        if not self._users and vars(self.zero).get("step") == self.run:
            del self.zero.step

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step, with hooks. This replaces ``step`` of DeepSpeed's optimizer."""
        self.has_moved = False
        self.scale = float(self.zero.loss_scale)  # of the gradients now; a dynamic one changes inside the step
        return self.step(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take DeepSpeed's own step; torch calls the hooks before and after this method."""
        result = self._step(*args, **kwargs)
        self.has_moved = True
        return result

    @property
    def grad_scale(self) -> Tensor | None:
        """The scale of the gradients before the step, under the attribute's name in torch's fused optimizers."""
        return None if self.scale == 1 else torch.tensor(self.scale)

    @property
    def found_inf(self) -> bool:
        """Whether the last step was skipped, because gradients overflowed."""
        return bool(getattr(self.zero, "overflow", False))

    def divisor(self) -> Tensor:
        """Return the divisor of the last step's gradients, 0-d: the loss scale times the clipping divisor."""
        limit, norm = float(self.zero.clip_grad), getattr(self.zero, "_global_grad_norm", None)
        scale = torch.tensor(self.scale)
        if limit <= 0 or norm is None:
            return scale
        return scale * ((torch.as_tensor(norm, dtype=torch.float32) + 1e-6) / limit).clamp(min=1)


class _Use:
    """The handle from one call of `ZeroSteps.install_`."""

    def __init__(self, steps: ZeroSteps) -> None:
        self._steps = weakref.ref(steps)

    def remove(self) -> None:
        """End the use."""
        steps = self._steps()
        if steps is not None:
            steps.leave_(self)


class ZeroEngine(Engine):
    """ZeRO-1, 2 and 3. Methods see stand-ins for the adapters' parameters: gathered, in fp32, with gradients.

    DeepSpeed clips inside its step, so gradients that a method adds are clipped too.
    """

    withholds = False
    is_shared = True

    def __init__(self, steps: ZeroSteps) -> None:
        # The adapter refers to its engine, and must not keep the optimizer in memory: after `begin_`, only DeepSpeed's
        # own optimizer does.
        self._new: ZeroSteps | None = steps
        self._steps = weakref.ref(steps)
        self._parts = parts_of(steps.param_groups[0]["params"])
        self._kept: dict[int, Tensor] = {}  # gradients, from before the step to after it
        self._barrier = Barrier()

    @property
    def optimizer(self) -> ZeroSteps:
        """The optimizer with the step hooks. Raises `StepError` if DeepSpeed's optimizer no longer exists."""
        steps = self._steps()
        if steps is None:
            raise StepError("DeepSpeed's optimizer is gone; attach the adapter to a new one")
        return steps

    @property
    def name(self) -> str:
        """The engine's name in messages."""
        return "DeepSpeed ZeRO"

    @property
    def fixed_shapes(self) -> str:
        """The reason why parameters must not change shape."""
        return _FIXED

    @property
    def splits(self) -> bool:
        """Whether a rank has only shards: of parameters under ZeRO-3, else of 16-bit parameters' master weights."""
        return self._parts.splits

    @property
    def is_writer(self) -> bool:
        """Whether this is rank 0."""
        return rank() == 0

    def begin_(self, adapters: Sequence[Tuner], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Compare the adapters, and hook DeepSpeed's step. DeepSpeed has broadcast the weights of rank 0 already."""
        number = refuse_differing(adapters, optimizer)
        for tuner in adapters:
            buffers = [buffer for _, slot in slots_in(tuner) for buffer in slot.buffers()]
            if starts_alike(tuner) and buffers:
                self.agree_(buffers, f"the start of adapter {tuner.name!r}")
        members = self._barrier.open_((tuner.name for tuner in adapters), adapters[0].model, number)
        for tuner in adapters:
            # ZeRO-3 gathers its shards in forwards too.
            self._barrier.watch_(tuner.model, forwards=any(map(is_sharded, tuner.model.parameters())))
        handles = {name: (self.optimizer.install_(), member) for name, member in members.items()}
        self._new = None
        return handles

    def before_step_(self, optimizer: Optimizer) -> None:
        """Wait for all ranks before DeepSpeed's collectives in a step. See `Barrier.before_step_`."""
        self._barrier.before_step_(optimizer, always=True)

    @contextmanager
    def whole(self, slots: Sequence[nn.Module], *, gradients: bool) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside the block, replace parameters by stand-ins; then write their values to DeepSpeed. See `Engine`.

        Before a step, the gradients are read from DeepSpeed, which frees them in the step. After the step, the block
        has kept copies of them, unscaled and clipped as in the step.
        """
        places = _places(slots)
        own = list({id(parameter): parameter for _, _, parameter in places}.values())
        if not own:
            yield lambda parameter: parameter
            return
        steps = self._steps()
        fresh = gradients and steps is not None and not steps.has_moved
        values, vector = self._parts.read(own, gradients=fresh, what="the parts of the adapters")
        pairs = [(p, nn.Parameter(value, p.requires_grad)) for p, value in zip(own, values, strict=True)]
        trained = [(p, stand_in) for p, stand_in in pairs if p.requires_grad]
        if fresh:
            for (_, stand_in), gradient in zip(trained, unflatten(vector, [p for p, _ in trained]), strict=True):
                stand_in.grad = gradient
        elif gradients and steps is not None:
            self._return_(trained, steps.divisor())
        with _put_in(places, pairs) as outside:
            yield outside
        self._parts.write_(own, [stand_in.detach() for _, stand_in in pairs])
        if fresh:
            self._kept |= {id(p): _gradient(stand_in) for p, stand_in in trained}
            self._parts.write_gradients_([p for p, _ in trained], [self._kept[id(p)] for p, _ in trained])

    def _return_(self, trained: Sequence[tuple[nn.Parameter, nn.Parameter]], divisor: Tensor) -> None:
        """Restore the stand-ins' gradients from before the step, divided like DeepSpeed's gradients in the step."""
        for parameter, stand_in in trained:
            stand_in.grad = self._kept.pop(id(parameter), None)
        torch_private.divide_([s.grad for _, s in trained if s.grad is not None], divisor.to(trained[0][1].device))

    def write_once(self, place: Path, content: str, write: Callable[[], Path]) -> Path:
        """See `Engine`."""
        return written_once(self, place, content, write)

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Broadcast from rank 0. See `Engine`."""
        take_from_first_(tensors, what)


Place = tuple[dict[str, nn.Parameter | None], str, nn.Parameter]


def _places(slots: Sequence[nn.Module]) -> list[Place]:
    """Return (module's dict of parameters, key, parameter) for ZeRO's parameters below ``slots``.

    Inside a block of `ZeroEngine.whole` the result is empty, because stand-ins are not ZeRO's.
    """
    tables = [torch_private.own_parameters(module) for slot in slots for module in slot.modules()]
    return [(table, key, p) for table in tables for key, p in table.items() if p is not None and is_of_deepspeed(p)]


@contextmanager
def _put_in(
    places: Sequence[Place], pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside the block, replace the first parameter of each pair by the second; yield the inverse mapping."""
    inside = {id(parameter): stand_in for parameter, stand_in in pairs}
    outside = {id(stand_in): parameter for parameter, stand_in in pairs}
    for table, key, parameter in places:
        table[key] = inside[id(parameter)]
    try:
        yield lambda parameter: outside.get(id(parameter), parameter)
        for table, key, parameter in places:
            _take_over_(inside[id(parameter)], table[key])
    finally:
        for table, key, parameter in places:
            table[key] = parameter


@torch.no_grad()
def _take_over_(stand_in: nn.Parameter, found: nn.Parameter | None) -> None:
    """Copy ``found``, which may have replaced the stand-in inside the block, into the stand-in."""
    if found is stand_in:
        return
    if found is None or found.shape != stand_in.shape:
        raise StepError(f"{_FIXED}; a parameter of shape {tuple(stand_in.shape)} was replaced by another shape")
    stand_in.copy_(found)
    stand_in.grad = found.grad


def _gradient(stand_in: nn.Parameter) -> Tensor:
    return torch.zeros_like(stand_in) if stand_in.grad is None else stand_in.grad
