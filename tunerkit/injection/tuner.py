"""The tuner: the handle on one adapter of a wrapped model."""

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import attrs
from torch import nn

from tunerkit.config import AdapterConfig
from tunerkit.errors import AdapterError, StepError, closest
from tunerkit.hooks import registry
from tunerkit.injection.root import expect_module
from tunerkit.injection.slots import Slot, base_modules, slots_of, walk
from tunerkit.layers import Adapter
from tunerkit.records import RankChange, State, Target

_ATTRIBUTE = "_tunerkit"
# Tuners, copies too, that the watch over optimizers has not seen yet.
unseen: WeakSet["Tuner"] = WeakSet()


@attrs.define(eq=False)
class Tuner:
    """One adapter of a wrapped model. It lives in the model, so a deep copy of the model has tuners of its own.

    ``copies`` and ``biases`` are the paths of the modules trained in full as copies and of those whose bias is;
    ``frozen`` are the base parameters that wrapping froze. ``turn`` orders the active adapters; None while not active.
    ``state`` belongs to the method, from attach on.
    ``fingerprint`` is the base's, kept where a permanent merge has overwritten the base.
    """

    name: str
    method: str
    config: AdapterConfig
    model: nn.Module
    targets: tuple[Target, ...]
    copies: tuple[Target, ...] = ()
    biases: tuple[Target, ...] = ()
    frozen: tuple[str, ...] = ()
    turn: int | None = None
    steps: int = 0
    total_steps: int | None = None
    state: object | None = None
    history: list[RankChange] = attrs.field(factory=list)
    loaded: bool = False
    fingerprint: dict[str, dict[str, Any]] | None = None

    def __attrs_post_init__(self) -> None:
        unseen.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return attrs.asdict(self, recurse=False)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """For deep copies and pickles, which do not pass through the initialiser."""
        for name, value in state.items():
            setattr(self, name, value)
        unseen.add(self)

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """This adapter's slots with the paths of their modules: targets, copies, other trained biases."""
        # By the record first: another adapter may have taken the name of one that was deleted.
        present = own_tuners(self.model).get(self.name) is self
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
        if registry.implements("tunerkit_budget", self.method):
            found: int = registry.call("tunerkit_budget", self.method, tuner=self, step=step)
            return found
        return sum(self.ranks().values())

    def finish(self) -> None:
        """Make the final allocation now, whatever the schedule says. Nothing happens for methods without one.

        Raises `StepError` while the model is merged: the masks would change under merged weights.
        """
        if any(slots.merged for _, _, slots in walk(self.model)):
            raise StepError("the model is merged; call tunerkit.unmerge before finish()")
        self.record(registry.call("tunerkit_finish", self.method, tuner=self))

    def record(self, ranks: Mapping[str, int] | None) -> None:
        """Note an allocation in ``history`` and tell every plugin; None means that no mask changed."""
        if ranks is None:
            return
        change = RankChange(step=self.steps, budget=self.budget(), ranks=dict(ranks))
        self.history.append(change)
        registry.call_all("tunerkit_ranks_changed", tuner=self, change=change)

    def training_state(self) -> State:
        """What training needs to go on, apart from the adapter's weights."""
        found: State | None = registry.call("tunerkit_state", self.method, tuner=self)
        return found if found is not None else State(tensors={}, values={})


def tuners_of(model: nn.Module) -> dict[str, Tuner]:
    """All tuners of ``model`` by adapter name; wrappers such as DDP and compiled modules are seen through.

    Raises `AdapterError` for what is no module, and if several parts of it were wrapped on their own: one answer would
    leave the others out.
    """
    # By identity: a shallow copy shares the record.
    modules = base_modules(expect_module(model))
    roots = {id(found): (path, module) for path, module in modules if (found := own_tuners(module))}
    if len(roots) > 1:
        paths = ", ".join(repr(path) if path else "the model itself" for path, _ in roots.values())
        raise AdapterError(
            f"several parts of this {type(model).__name__} were wrapped on their own: {paths}; call it on one of them, "
            "or unwrap them and wrap the whole"
        )
    return next((own_tuners(module) for _, module in roots.values()), {})


def own_tuners(model: nn.Module) -> dict[str, Tuner]:
    """The tuners that ``model`` carries itself: it is what was wrapped, and no module around or inside it."""
    found: dict[str, Tuner] = vars(model).get(_ATTRIBUTE, {})
    return found


def set_tuners(model: nn.Module, tuners: dict[str, Tuner]) -> None:
    """Let ``model`` carry ``tuners``; nothing of tunerkit stays behind when there are none."""
    if tuners:
        vars(model)[_ATTRIBUTE] = tuners
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
    return tuner.turn is not None or any(p.grad is not None for p in tuner.parameters())
