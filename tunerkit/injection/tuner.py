"""The tuner: the handle on one adapter of a wrapped model."""

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import attrs
from torch import nn

from tunerkit import hooks
from tunerkit.config import AdapterConfig
from tunerkit.errors import AdapterError, StepError, closest
from tunerkit.injection.progress import Progress
from tunerkit.injection.root import expect_module
from tunerkit.injection.slots import Slot, base_modules, slots_of, walk
from tunerkit.layers import Adapter
from tunerkit.records import RankChange, State, Target

_ATTRIBUTE = "_tunerkit"
# Tuners, copies too, that the watch over optimizers has not seen yet.
unseen: WeakSet["Tuner"] = WeakSet()


@attrs.define(eq=False, on_setattr=attrs.setters.frozen)
class Tuner:
    """One adapter of a wrapped model. It lives in the model, so a deep copy of the model has tuners of its own.

    It is a handle: what it says of the adapter stays, and all that training changes stands in ``progress``.
    ``copies`` and ``biases`` are the modules trained in full as copies, and those whose bias is. ``loaded`` says that
    the adapter came from a file.
    """

    name: str
    method: str
    config: AdapterConfig
    model: nn.Module
    targets: tuple[Target, ...]
    copies: tuple[Target, ...] = ()
    biases: tuple[Target, ...] = ()
    loaded: bool = False
    progress: Progress = attrs.field(factory=Progress)

    def __attrs_post_init__(self) -> None:
        unseen.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return attrs.asdict(self, recurse=False)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """For deep copies and pickles, which do not pass through the initialiser."""
        for name, value in state.items():
            object.__setattr__(self, name, value)
        unseen.add(self)

    def rename_(self, name: str) -> None:
        """Take another name; injection calls it, with the slots and the record of the model."""
        object.__setattr__(self, "name", name)

    @property
    def steps(self) -> int:
        """Optimizer steps taken since `attach`, or in the training that the loaded file came from."""
        return self.progress.steps

    @property
    def total_steps(self) -> int | None:
        """The length of training in optimizer steps, if it is known."""
        return self.progress.total_steps

    @property
    def history(self) -> list[RankChange]:
        """The allocations so far, the oldest first."""
        return self.progress.history

    @property
    def state(self) -> object | None:
        """The method's own training state, from `attach` on; `tunerkit_restore` may replace it."""
        return self.progress.state

    @state.setter
    def state(self, state: object | None) -> None:
        self.progress.state = state

    @property
    def needs_steps(self) -> bool:
        """Whether the method is useless unless the optimizer drives it."""
        return hooks.registry.get(self.method).needs_steps

    @property
    def is_active(self) -> bool:
        """Whether the adapter is applied in forward."""
        return self.name in wrapped_of(self.model).active

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """This adapter's slots with the paths of their modules: targets, copies, other trained biases."""
        # By the record first: another adapter may have taken the name of one that was deleted.
        present = wrapped_of(self.model).tuners.get(self.name) is self
        for path, module in self.modules().items():
            slots = slots_of(module)
            slot = slots.get(self.name) if slots is not None and present else None
            if slot is None:
                raise AdapterError(f"adapter {self.name!r} is gone from the model at {path!r}; wrap or load it again")
            yield path, slot

    def modules(self) -> dict[str, nn.Module]:
        """The adapted modules by path."""
        return {place.path: place.module for place in (*self.targets, *self.copies, *self.biases)}

    def adapters(self) -> dict[str, Adapter]:
        """The method's adapters by target path."""
        paths = {target.path for target in self.targets}
        return {path: slot.adapter for path, slot in self.slots() if path in paths and slot.adapter is not None}

    def parameters(self) -> Iterator[nn.Parameter]:
        """What this adapter trains. Looked up afresh each time: FSDP2 replaces Parameter objects."""
        for _, slot in self.slots():
            yield from slot.parameters()

    def ranks(self) -> dict[str, int]:
        """Live rank by target path: AdaLoRA's last mask, LoRA's constant."""
        return {path: adapter.rank for path, adapter in self.adapters().items()}

    def budget(self, step: int | None = None) -> int:
        """The budget in force after ``step`` optimizer steps (None: now), in the method's budget unit."""
        found = hooks.budget(self, step)
        return sum(self.ranks().values()) if found is None else found

    def finish(self) -> None:
        """Make the final allocation now, whatever the schedule says. Nothing happens for methods without one.

        Raises `StepError` while the model is merged: the masks would change under merged weights.
        """
        if any(slots.merged for _, _, slots in walk(self.model)):
            raise StepError("the model is merged; call tunerkit.unmerge before finish()")
        self.record(hooks.finish(self))

    def record(self, ranks: Mapping[str, int] | None) -> None:
        """Note an allocation in ``history`` and tell every plugin; None means that no mask changed."""
        if ranks is None:
            return
        change = RankChange(step=self.steps, budget=self.budget(), ranks=dict(ranks))
        self.history.append(change)
        hooks.ranks_changed(self, change)

    def training_state(self) -> State:
        """What training needs to go on, apart from the adapter's weights."""
        return hooks.state(self)


@attrs.define(eq=False)
class Wrapped:
    """What a wrapped model carries: its tuners by name, the oldest first, and what concerns all of them.

    ``active`` are the names of the adapters that forward applies, in order. ``frozen`` are the base parameters that
    wrapping froze. ``fingerprints`` are the base's for each adapter, kept where a permanent merge overwrote the base.
    """

    tuners: dict[str, Tuner] = attrs.field(factory=dict)
    active: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    fingerprints: dict[str, dict[str, dict[str, Any]]] = attrs.field(factory=dict)


def tuners_of(model: nn.Module) -> dict[str, Tuner]:
    """All tuners of ``model`` by adapter name; wrappers such as DDP and compiled modules are seen through.

    Raises `AdapterError` for what is no module, and if several parts of it were wrapped on their own: one answer would
    leave the others out.
    """
    # By identity: a shallow copy shares the record.
    modules = base_modules(expect_module(model))
    roots = {id(found): (path, found) for path, module in modules if (found := vars(module).get(_ATTRIBUTE))}
    if len(roots) > 1:
        paths = ", ".join(repr(path) if path else "the model itself" for path, _ in roots.values())
        raise AdapterError(
            f"several parts of this {type(model).__name__} were wrapped on their own: {paths}; call it on one of them, "
            "or unwrap them and wrap the whole"
        )
    return next((dict(found.tuners) for _, found in roots.values()), {})


def wrapped_of(model: nn.Module) -> Wrapped:
    """What ``model`` carries itself, and no module around or inside it; an empty record if it was not wrapped."""
    found: Wrapped | None = vars(model).get(_ATTRIBUTE)
    return Wrapped() if found is None else found


def set_wrapped(model: nn.Module, wrapped: Wrapped) -> None:
    """Let ``model`` carry ``wrapped``; nothing of tunerkit stays behind when there are no tuners."""
    if wrapped.tuners:
        vars(model)[_ATTRIBUTE] = wrapped
    else:
        vars(model).pop(_ATTRIBUTE, None)


def require_tuners(model: nn.Module) -> dict[str, Tuner]:
    """`tuners_of`, or an error if the model has no adapter."""
    tuners = tuners_of(model)
    if not tuners:
        raise AdapterError(f"this {type(model).__name__} has no adapter; call tunerkit.wrap or tunerkit.load first")
    return tuners


def tuner(model: nn.Module, adapter: str | None = None) -> Tuner:
    """The handle on one adapter of ``model``; without a name the model must have exactly one.

    Raises `AdapterError` if the model is not wrapped, the name is unknown, or the choice is ambiguous.
    """
    tuners = require_tuners(model)
    if adapter is None:
        if len(tuners) > 1:
            raise AdapterError(f"the model has several adapters: {', '.join(tuners)}; say which: adapter=...")
        return next(iter(tuners.values()))
    if adapter not in tuple(tuners):  # what was given need not be hashable
        hint = closest(str(adapter), tuners)
        raise AdapterError(f"no adapter named {adapter!r}; there are: {', '.join(tuners)}{hint}")
    return tuners[adapter]


def is_frozen(tuner: Tuner) -> bool:
    """Whether it has parameters and none is trained."""
    own = tuner.parameters()
    first = next(own, None)  # asked at each step: most often the first one tells
    return first is not None and not first.requires_grad and not any(p.requires_grad for p in own)


def takes_part(tuner: Tuner) -> bool:
    """Whether the optimizer's step is one of the adapter's: not while frozen; else if active or given a gradient.

    So adapters that share an optimizer and are trained in turn count their own steps. Under a clock (a Trainer's global
    step) the number of a step is the same for all, and an adapter sees those that it takes part in.
    """
    if is_frozen(tuner):
        return False
    return tuner.is_active or any(p.grad is not None for p in tuner.parameters())
