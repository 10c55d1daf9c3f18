"""The tuner: the handle on one adapter of a wrapped model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import attrs
import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.config import AdapterConfig
from tunerkit.engine import Alone, Engine, Pieces, same
from tunerkit.errors import AdapterError, StepError, closest
from tunerkit.injection.contents import biases_in, copies_in, factors_in
from tunerkit.injection.merged_state import is_merged
from tunerkit.injection.progress import Progress
from tunerkit.injection.root import inside
from tunerkit.injection.slots import Slot, Slots, base_modules, slots_of
from tunerkit.layers import Adapter, BaseLayer, OutputLayer
from tunerkit.libraries import is_zero_shard
from tunerkit.paths import join
from tunerkit.records import Factors, RankChange, State, Target

# The attribute of a wrapped model that holds its `Wrapped`.
WRAPPED = "_tunerkit"


class _Unseen(WeakSet["Tuner"]):
    """Tuners, including copies, that the watch over optimizers has not seen yet.

    The watch sets ``notify``: a model that another process wrapped is unpickled without a call of `wrap`.
    """

    notify: Callable[[], object] = staticmethod(lambda: None)


_NOTIFY = "notify"  # the entry of a pickled tuner

# State of the process: an optimizer does not know the model whose parameters it holds.
unseen = _Unseen()


@attrs.define(eq=False, on_setattr=attrs.setters.frozen)
class Tuner:
    """The handle on one adapter of a wrapped model. It lives in the model, so a deep copy of the model has its own.

    Attributes:
        name: The adapter's name.
        method: The method's name.
        config: The method's settings.
        model: The wrapped model.
        targets: The targets with an adapter of the method, in the model's order.
        copies: The modules that are trained in full, as copies.
        biases: The other modules whose bias is trained.
        loaded: Whether the adapter came from a file.
        progress: What changes during training. The other fields stay as they are.
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
        # The function is pickled by its name: a process that only unpickles a model imports the watch with it.
        return {**attrs.asdict(self, recurse=False), _NOTIFY: unseen.notify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a deep copy or pickle, for which `__init__` does not run."""
        notify = state.get(_NOTIFY, unseen.notify)  # pickles of earlier versions lack it
        for name, value in state.items():
            if name != _NOTIFY:
                object.__setattr__(self, name, value)
        unseen.add(self)
        notify()

    @property
    def steps(self) -> int:
        """The number of optimizer steps since `attach`, or in the training that the loaded file came from."""
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
        """Whether the method only works if an optimizer drives it."""
        return hooks.registry.get(self.method).needs_steps

    @property
    def engine(self) -> Engine:
        """What the processes of the training do together, from `attach` on; before that each is alone.

        A frozen adapter is never attached. If DeepSpeed has partitioned it too, the engine of one that is trained
        beside it gathers it.
        """
        if self.progress.link is not None:
            return self.progress.link.engine
        links = (other.progress.link for other in wrapped_of(self.model).tuners.values())
        beside = next((link.engine for link in links if link is not None and link.engine.splits), None)
        if beside is not None and is_frozen(self) and any(map(is_zero_shard, self.parameters())):
            return beside
        return Alone()

    @property
    def is_active(self) -> bool:
        """Whether forward applies the adapter."""
        return self.name in wrapped_of(self.model).active

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """Find the adapter's slots in the model.

        Returns:
            Pairs of a module's path and the adapter's slot there: targets, copies, then other trained biases.

        Raises:
            AdapterError: The adapter is not in the model any more, or not at one of its modules.
        """
        # By the record first: another adapter may have taken the name of one that was deleted.
        present = wrapped_of(self.model).tuners.get(self.name) is self
        for path, module in self.modules().items():
            slots = slots_of(module)
            slot = slots.get(self.name) if slots is not None and present else None
            if slot is None:
                raise AdapterError(f"adapter {self.name!r} is gone from the model at {path!r}; wrap or load it again")
            yield path, slot

    def factors(self) -> dict[str, Factors]:
        """Return what the adapter adds to the weight of each target as a product, on the CPU and without gradients.

        Returns:
            The products by target path: q (r, in), p (out, r). The rank r differs between targets and may be 0.

        Raises:
            AdapterError: The method adds something that is no product, or also adds to biases.
        """
        return factors_in(self._places(), self.method)

    def copied(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the modules trained in full, on the CPU, by module path and by name in the module."""
        return copies_in(self._places())

    def trained_biases(self) -> dict[str, Tensor]:
        """Return the other trained biases, (out,), on the CPU, by module path."""
        return biases_in(self._places())

    def _places(self) -> Iterator[tuple[str, Slots, Slot]]:
        modules = self.modules()
        for path, slot in self.slots():
            slots = slots_of(modules[path])
            assert slots is not None
            yield path, slots, slot

    def modules(self) -> dict[str, nn.Module]:
        """Return the adapted modules by path."""
        return {target.path: target.module for target in (*self.targets, *self.copies, *self.biases)}

    def adapters(self) -> dict[str, Adapter]:
        """Return the method's adapters by target path."""
        return {path: slot.adapter for path, slot in self.slots() if slot.adapter is not None}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters. They are looked up at each call, since FSDP2 replaces Parameter objects.

        Those that the method keeps fixed are among them, with ``requires_grad=False``.
        """
        for _, slot in self.slots():
            yield from slot.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the adapter's parameters with their names in the adapter's file, such as ``"encoder.0.adapter.b"``."""
        for path, slot in self.slots():
            yield from ((join(path, name), parameter) for name, parameter in slot.named_parameters())

    @property
    def shared(self) -> nn.Module | None:
        """The module that the method's adapters share, if there is one; see the hook `tunerkit_shared`."""
        return next((slot.shared for _, slot in self.slots() if slot.shared is not None), None)

    def ranks(self) -> dict[str, int]:
        """Return the live rank by target path: AdaLoRA's last mask, LoRA's constant."""
        return {path: adapter.rank for path, adapter in self.adapters().items()}

    def budget(self, step: int | None = None) -> int:
        """Return the budget in force after an optimizer step.

        Args:
            step: The number of the step, from 1; None for now.

        Returns:
            The budget in the method's unit. Without a budget of the method, the sum of the ranks.
        """
        found = hooks.budget(self, step)
        return sum(self.ranks().values()) if found is None else found

    def finish(self) -> None:
        """Make the final allocation now, regardless of the schedule. Methods without one do nothing.

        In a training of several processes, call it in each of them.

        Raises:
            StepError: The model is merged, so the masks would change under merged weights.
        """
        if is_merged(self.model):
            raise StepError("the model is merged; call tunerkit.unmerge before finish()")
        with torch.no_grad(), self.as_hooks_see_it():
            ranks = hooks.finish(self)
            self.record(ranks)

    def record(self, ranks: Mapping[str, int] | None) -> None:
        """Add an allocation to ``history`` and notify every plugin.

        Args:
            ranks: The live rank by target path; None if no mask changed, which records nothing.
        """
        if ranks is not None:
            change = RankChange(step=self.steps, budget=self.budget(), ranks=dict(ranks))
            self.history.append(change)
            hooks.ranks_changed(self, change)

    def training_state(self) -> State:
        """Return what is needed to resume training, in addition to the adapter's weights."""
        with self.as_hooks_see_it():
            return hooks.state(self)

    @contextmanager
    def as_hooks_see_it(self, *, gradients: bool = False) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside the block, parameters are what the method works on: pieces if it can, else whole as in `whole`."""
        if self.engine.gives_pieces and hooks.registry.get(self.method).pieces:
            self.engine.reshard_()
            yield same
            return
        with self.whole(gradients=gradients) as outside:
            yield outside

    @contextmanager
    def whole(self, *, gradients: bool = False) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside the block, this process holds the whole adapter. Where it holds a shard otherwise, all must call this.

        Args:
            gradients: Whether the gradients are needed too.

        Yields:
            A function from a parameter inside the block to the one outside of it, which the optimizer knows.
        """
        engine = self.engine
        if not engine.splits and engine.withholds:  # whole as they are; each step asks, and finding slots takes long
            yield same
            return
        with engine.whole([slot for _, slot in self.slots()], gradients=gradients) as outside:
            yield outside

    def pieces(self, parameters: Sequence[nn.Parameter]) -> Pieces:
        """Return what this process holds of the adapter's parameters: plain tensors, also where an engine cut them.

        Only the hooks of a method whose record says ``pieces=True`` see parameters that are cut. Inside `whole`, and
        where nothing is cut, the pieces are the parameters themselves.

        Args:
            parameters: Parameters of this adapter, as its modules have them now.
        """
        return self.engine.pieces(parameters)

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Overwrite tensors with those of process 0, so that the processes of one training decide alike.

        Two processes on unlike hardware round in different ways. Call this with the scores before an allocation, and
        with weights that were decomposed. In one process it does nothing.

        Args:
            tensors: Tensors of the same shapes in every process.
            what: What they are, for messages.
        """
        self.engine.agree_(tensors, f"{what} of adapter {self.name!r}")


@attrs.define(eq=False)
class Wrapped:
    """What a wrapped model holds of tunerkit, for all its adapters.

    Attributes:
        tuners: The tuners by adapter name, the oldest first.
        active: The names of the adapters that forward applies, in order.
        frozen: The names of the base parameters that wrapping froze.
        told: What a warning has said of the base that no adapter's file holds.
        held: The attributes of base layers that have another value meanwhile, as (module, name, earlier value).
    """

    tuners: dict[str, Tuner] = attrs.field(factory=dict)
    active: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    told: set[str] = attrs.field(factory=set)
    held: list[tuple[nn.Module, str, object]] = attrs.field(factory=list)


def wrapped_of(model: nn.Module) -> Wrapped:
    """Return what ``model`` itself holds, not the modules around or inside it; an empty record if it is not wrapped."""
    found: Wrapped | None = vars(model).get(WRAPPED)
    return Wrapped() if found is None else found


def tuners_of(model: nn.Module) -> dict[str, Tuner]:
    """Return all tuners of ``model`` by adapter name, also if it is inside DDP or a compiled module.

    Raises:
        AdapterError: ``model`` is not a module, or several parts of it were wrapped on their own: one answer would
            leave the others out.
    """
    # By identity: a shallow copy shares the record.
    modules = base_modules(inside(model))
    roots = {id(found): (path, found) for path, module in modules if (found := vars(module).get(WRAPPED))}
    if len(roots) > 1:
        paths = ", ".join(repr(path) if path else "the model itself" for path, _ in roots.values())
        raise AdapterError(
            f"several parts of this {type(model).__name__} were wrapped on their own: {paths}; call it on one of them, "
            "or unwrap them and wrap the whole"
        )
    return next((dict(found.tuners) for _, found in roots.values()), {})


def require_tuners(model: nn.Module) -> dict[str, Tuner]:
    """Return `tuners_of`, or raise `AdapterError` if the model has no adapter."""
    tuners = tuners_of(model)
    if not tuners:
        raise AdapterError(f"this {type(model).__name__} has no adapter; call tunerkit.wrap or tunerkit.load first")
    return tuners


def wrapped_model(model: nn.Module) -> nn.Module:
    """Return the model that was wrapped, which may be inside another module. Raises `AdapterError` if there is none."""
    return next(iter(require_tuners(model).values())).model


def tuner(model: nn.Module, adapter: str | None = None) -> Tuner:
    """Return the handle on one adapter of a wrapped model.

    Args:
        model: The wrapped model, which may be inside DDP or a compiled module.
        adapter: The adapter's name. It may be omitted if the model has only one.

    Returns:
        The tuner. Each call returns the same object.

    Raises:
        AdapterError: The model is not wrapped, the name is unknown, or there are several adapters and no name.
    """
    tuners = require_tuners(model)
    if adapter is None:
        if len(tuners) > 1:
            raise AdapterError(f"the model has several adapters: {', '.join(tuners)}; say which: adapter=...")
        return next(iter(tuners.values()))
    if adapter not in tuple(tuners):  # a wrong argument may not be hashable
        hint = closest(str(adapter), tuners)
        raise AdapterError(f"no adapter named {adapter!r}; there are: {', '.join(tuners)}{hint}")
    return tuners[adapter]


def base_of(tuner: Tuner, module: nn.Module, base: BaseLayer | None) -> BaseLayer | None:
    """Return a target as its method sees it: ``base``, or a layer without weight for a method that adapts outputs.

    Args:
        tuner: The adapter's handle.
        module: The target's module.
        base: The module as a base layer, if a kind matches it.
    """
    if base is None and hooks.registry.get(tuner.method).targets == "outputs":
        return OutputLayer(module)
    return base


def is_frozen(tuner: Tuner) -> bool:
    """Return whether the adapter has parameters and trains none of them."""
    own = tuner.parameters()
    first = next(own, None)  # each step calls this, and the first parameter is usually enough
    return first is not None and not first.requires_grad and not any(p.requires_grad for p in own)


def takes_part(tuner: Tuner) -> bool:
    """Return whether the adapter takes part in an optimizer step: it is not frozen, and is active or has a gradient.

    So adapters that share an optimizer and are trained alternately count their own steps. With a clock (a Trainer's
    global step), a step has the same number for all, and an adapter sees those in which it takes part.
    """
    return not is_frozen(tuner) and (tuner.is_active or any(p.grad is not None for p in tuner.parameters()))
