"""The tuner, which is the handle on one adapter of a wrapped model, and a model's record of its adapters."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import ref

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit import hooks
from tunerkit.config import AdapterConfig
from tunerkit.errors import AdapterError, StepError, TunerkitWarning, closest, cut, error_text
from tunerkit.hooks import Engine, Pieces, Removable, same
from tunerkit.injection.slots import Slot, base_modules, inside, is_merged, slots_of
from tunerkit.layers import Adapter, weights, whole_shape
from tunerkit.paths import few, is_number, join
from tunerkit.records import RankChange, State, Target

# The attribute of a wrapped model for its `Wrapped`.
WRAPPED = "_tunerkit"


@attrs.frozen(eq=False)
class Link:
    """The handles of the hooks through which an optimizer drives an adapter, until `detach`.

    It does not refer to the tuner, so that a model can be freed.
    """

    optimizer: "ref[Optimizer]"
    handles: list[Removable] = attrs.field(factory=list)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # In a deep copy or pickle it becomes None, since the optimizer does not drive the copy.
        return type(None), ()


@attrs.define(eq=False)
class Progress:
    """The mutable state of an adapter's training, and facts about its base. Steps, saving and merging write to it."""

    steps: int = 0  # optimizer steps taken
    total_steps: int | None = None  # the length of training
    history: list[RankChange] = attrs.field(factory=list)  # the allocations so far, the oldest first
    link: Link | None = None  # to the optimizer, since `attach`
    loaded: bool = False  # whether the adapter was loaded from a file
    calibration: dict[str, int] | None = None  # the numbers of batches and input rows, after `tunerkit.calibrate`
    fingerprint: dict[str, dict[str, Any]] | None = attrs.field(default=None, repr=False)  # before a permanent merge
    shapes: dict[str, tuple[int, ...]] = attrs.field(factory=dict, repr=False)  # of the base's parameters
    # New modules of the base that another active adapter trained in full when this adapter was injected. The
    # fingerprint excludes them, since this adapter never used the base's own values.
    beside: tuple[str, ...] = ()
    # The base's fingerprint, if a group of processes may shard the base later.
    noted: dict[str, dict[str, Any]] | None = attrs.field(default=None, repr=False)
    settings: dict[str, Any] = attrs.field(factory=dict)  # the base's settings from the loaded file
    seed: int | None = None  # the seed passed to `wrap`
    files: dict[str, str] = attrs.field(factory=dict)  # the kind of each file that was loaded or saved, by path
    last: Any = attrs.field(default=None, repr=False)  # the step driver's `LastGradient`


@attrs.define(eq=False, repr=False, on_setattr=attrs.setters.frozen)
class Tuner:
    """The handle on one adapter of a wrapped model, and part of the model: a deep copy of the model has its own tuner.

    Attributes:
        name: The adapter's name.
        method: The method's name.
        config: The method's settings.
        model: The wrapped model.
        targets: The targets with an adapter of the method, in the model's order.
        copies: The modules that are trained in full, as copies.
        biases: The other modules whose bias is trained.
        progress: The mutable state of training.
        state: The method's own training state, since `attach`; `tunerkit_restore` may replace it.
        engine: The engine that shards or synchronizes the adapter, since `attach`; by default for a single process.
    """

    name: str
    method: str
    config: AdapterConfig
    model: nn.Module
    targets: tuple[Target, ...]
    copies: tuple[Target, ...] = ()
    biases: tuple[Target, ...] = ()
    progress: Progress = attrs.field(factory=Progress)
    state: object | None = attrs.field(default=None, on_setattr=attrs.setters.NO_OP)
    engine: Engine = attrs.field(factory=Engine, on_setattr=attrs.setters.NO_OP)

    def __getstate__(self) -> dict[str, Any]:
        return attrs.asdict(self, recurse=False, filter=lambda field, value: field.name != "engine")

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is not attached, and the engine belongs to the training of the original.
        for name, value in {**state, "engine": Engine()}.items():
            object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # mypy would accept every name

        def __getattr__(self, name: str) -> object:
            raise AttributeError(f"'Tuner' object has no attribute {name!r}{hooks.elsewhere(name)}")

    def __repr__(self) -> str:
        lines = [f"tuner of adapter {self.name!r} in a {type(self.model).__name__}", f"  {outline(self)}"]
        for what, places in (("targets", self.targets), ("trained in full", self.copies), ("biases", self.biases)):
            if places:
                lines.append(f"  {len(places)} {what}: {few([place.path for place in places], shown=3)}")
        values = zip(attrs.fields(type(self.config)), attrs.astuple(self.config, recurse=False), strict=True)
        chosen = [f"{field.name}={value!r}" for field, value in values if value not in (field.default, (), {})]
        return "\n".join([*lines, cut(f"  settings: {', '.join(chosen) or 'the defaults'}", 400)])

    def _repr_html_(self) -> str:
        """Return the repr and the rank map as HTML, for notebooks."""
        ranks = table_of(self.ranks()) if wrapped_of(self.model).tuners.get(self.name) is self else ""
        return f'<pre style="white-space:pre-wrap">{escape(repr(self))}</pre>{ranks}'

    @property
    def steps(self) -> int:
        """The number of optimizer steps since `attach`; after a resume, counted on from the number in the file."""
        return self.progress.steps

    @property
    def total_steps(self) -> int | None:
        """The length of training in optimizer steps, if it is known."""
        return self.progress.total_steps

    @property
    def history(self) -> list[RankChange]:
        """The allocations so far, the oldest first."""
        return self.progress.history

    def adapters(self) -> dict[str, Adapter]:
        """Return the method's adapters by target path."""
        return {path: slot.adapter for path, slot in slots_in(self) if slot.adapter is not None}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters, looked up at each call, since FSDP2 replaces Parameter objects.

        Fixed parameters of the method are included, with ``requires_grad=False``.
        """
        return iter([parameter for _, slot in slots_in(self) for parameter in slot.parameters()])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the adapter's parameters with their names in the adapter's file, such as ``"encoder.0.adapter.b"``."""
        own = slots_in(self)
        return iter([(join(path, name), each) for path, slot in own for name, each in slot.named_parameters()])

    def ranks(self) -> dict[str, int]:
        """Return the live rank by target path: for AdaLoRA the rank of the last mask, for LoRA a constant."""
        return {path: adapter.rank for path, adapter in self.adapters().items()}

    def groups(self) -> dict[str, int]:
        """Warn that layers with the same input are no longer grouped. The next version removes this method."""
        warnings.warn(
            "tuner.groups() has nothing to count: layers with the same input are no longer grouped. Remove the call: "
            "the next version will not have this method",
            TunerkitWarning,
            stacklevel=2,
        )
        return {}

    def budget(self, step: int | None = None) -> int:
        """Return the budget in force after an optimizer step.

        Args:
            step: The number of the step, from 1; None for now.

        Returns:
            The budget in the method's unit; for a method without a budget, the sum of the ranks.
        """
        found = hooks.budget(self, step)
        return sum(self.ranks().values()) if found is None else found

    def finish(self) -> None:
        """Make the final allocation now, regardless of the schedule. A method without a schedule does nothing.

        In a training of several processes, call this in each of them.

        Raises:
            StepError: The model is merged, and its merged weights would no longer match the masks.
        """
        if is_merged(self.model):
            raise StepError("the model is merged; call tunerkit.unmerge before finish()")
        with torch.no_grad(), as_hooks_see_it(self):
            record(self, hooks.ask(hooks.specs.tunerkit_finish, self.method, tuner=self))

    def whole(self, *, gradients: bool = False) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Inside the block, the adapter is gathered in this process. If it is sharded, all processes must call this.

        Args:
            gradients: Whether to gather gradients too.

        Returns:
            A context manager. It yields a function that maps a gathered parameter to the parameter outside the block,
            which the optimizer has.
        """
        engine = engine_of(self)
        # The search for slots is slow, and each step may call this.
        slots = [slot for _, slot in slots_in(self)] if engine.splits or not engine.withholds else []
        return engine.whole(slots, gradients=gradients)

    def pieces(self, parameters: Sequence[nn.Parameter]) -> Pieces:
        """Return this process's shards of the adapter's parameters, as plain tensors.

        Only hooks of a method with ``pieces=True`` in its record see sharded parameters. Inside `whole`, and without
        sharding, the shards are the parameters themselves.

        Args:
            parameters: Parameters of this adapter, as its modules have them now.
        """
        return self.engine.pieces(parameters)

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Broadcast the values of tensors from process 0, so that all processes make the same decisions.

        Processes on different hardware round differently. Call this for scores before an allocation, and for decomposed
        weights. In a single process it does nothing.

        Args:
            tensors: Tensors of the same shapes in every process.
            what: A name for the tensors, for messages.
        """
        self.engine.agree_(tensors, f"{what} of adapter {self.name!r}")


@attrs.frozen
class Summary:
    """The parameter counts of a model.

    Attributes:
        trainable: The number of trainable parameters.
        total: The number of all parameters, including adapters.
        adapters: The number of parameters that each adapter trains, by adapter name.
    """

    trainable: int
    total: int
    adapters: dict[str, int]

    def __repr__(self) -> str:
        each = [f"{number:,} by {name!r}" for name, number in self.adapters.items()]
        return f"{self}" + (f": {few(each, shown=8)}" if each else "")

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2f} %)"


def outline(tuner: Tuner) -> str:
    """Return the method, ranks, budget, trained share and steps of an adapter in one line; it never raises."""
    steps = f"step {tuner.steps}" + ("" if tuner.total_steps is None else f" of {tuner.total_steps}")
    try:
        ranks, own = sorted(tuner.ranks().values()) or [0], (p for p in tuner.parameters() if p.requires_grad)
        rank = f"rank {ranks[0]}" + ("" if ranks[0] == ranks[-1] else f" to {ranks[-1]}")
        share = Summary(trainable=count(own), total=count(tuner.model.parameters()), adapters={})
        idle = "" if tuner.name in wrapped_of(tuner.model).active else ", not active"
        return f"{tuner.method}, {rank}, budget {tuner.budget()}, {share}, {steps}{idle}"
    except Exception as error:  # the adapter is gone, or a plugin's hook fails
        return f"{tuner.method}, {steps}: {error_text(error)}"


class Adapters(dict[str, Tuner]):
    """The tuners of a model by adapter name. Printed, it shows one line for each of the first nine tuners."""

    def __repr__(self) -> str:
        # Each outline counts the model's parameters, so their number is limited.
        lines = [f"{name!r}: {outline(tuner)}" for name, tuner in islice(self.items(), 9)]
        return "\n".join([*lines, *([f"and {len(self) - 9} more"] if len(self) > 9 else [])]) or "{}"


def table_of(ranks: Mapping[str, int]) -> str:
    """Return ranks by path as an HTML table: a row per layer, a column per matrix; "" if too large or without ranks."""
    rows: dict[str, dict[str, int]] = {}
    for path, rank in ranks.items():
        parts = path.split(".")
        end = next((at + 1 for at, part in enumerate(parts[:-1]) if is_number(part)), 0)
        rows.setdefault(".".join(parts[:end]), {})[".".join(parts[end:])] = rank
    columns, top = dict.fromkeys(matrix for row in rows.values() for matrix in row), max(ranks.values(), default=0)
    if not top or len(rows) * len(columns) > 10_000:
        return ""
    lines = ["".join(f"<th>{escape(name).replace('.', '.<wbr>')}</th>" for name in ("", *columns))]
    for layer, row in rows.items():  # the shade is thin, so that dark pages can be read too
        shades = {matrix: f"background:rgba(70,130,180,{0.6 * rank / top:.2f})" for matrix, rank in row.items()}
        cells = (f'<td style="{shades.get(matrix, "")}">{row.get(matrix, "")}</td>' for matrix in columns)
        lines.append(f"<th>{escape(layer)}</th>{''.join(cells)}")
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Count the elements of parameters, including shards in other processes."""
    return sum(whole_shape(parameter).numel() for parameter in parameters)


def modules_in(tuner: Tuner) -> dict[str, nn.Module]:
    """Return the adapted modules by path: targets, modules trained in full, then others with a trained bias."""
    return {place.path: place.module for place in (*tuner.targets, *tuner.copies, *tuner.biases)}


def slots_in(tuner: Tuner) -> list[tuple[str, Slot]]:
    """Return an adapter's (path, slot) pairs, ordered like `modules_in`. Raises `AdapterError` if a slot is gone."""
    # The tuner itself is compared too, since a new adapter may have the name of a deleted one.
    present, found = wrapped_of(tuner.model).tuners.get(tuner.name) is tuner, list[tuple[str, Slot]]()
    for path, module in modules_in(tuner).items():
        slots = slots_of(module)
        slot = slots.get(tuner.name) if slots is not None and present else None
        if slot is None:
            raise AdapterError(f"adapter {tuner.name!r} is gone from the model at {path!r}; wrap or load it again")
        found.append((path, slot))
    return found


def needs_steps(tuner: Tuner) -> bool:
    """Whether the tuner's method must be called at every optimizer step."""
    return hooks.registry.get(tuner.method).needs_steps


def engine_of(tuner: Tuner) -> Engine:
    """Return the engine that can gather the adapter.

    A frozen adapter is never attached. If it is sharded, the engine of another adapter of the model gathers it.
    """
    engines = (other.engine for other in wrapped_of(tuner.model).tuners.values())
    beside = next((engine for engine in engines if engine.splits), tuner.engine)
    if tuner.engine.splits or beside is tuner.engine or not is_frozen(tuner):
        return tuner.engine
    return tuner.engine if weights.sharding(tuner.parameters()) is None else beside


def as_hooks_see_it(tuner: Tuner, *, gradients: bool = False) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
    """Inside the block, parameters are sharded if the method supports shards, else gathered as in `Tuner.whole`."""
    if tuner.engine.gives_pieces and hooks.registry.get(tuner.method).pieces:
        tuner.engine.reshard_()
        return nullcontext(same)
    return tuner.whole(gradients=gradients)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block, every module is in eval mode; afterwards each module has its earlier mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def record(tuner: Tuner, ranks: Mapping[str, int] | None) -> None:
    """Add an allocation to an adapter's history, and notify every plugin; do nothing if ``ranks`` is None."""
    if ranks is not None:
        hooks.ranks_changed(tuner, tuner.history, tuner.steps, tuner.budget(), ranks)


def training_state(tuner: Tuner) -> State:
    """Return the method's training state, which resuming needs beside the adapter's weights."""
    with as_hooks_see_it(tuner):
        found = hooks.ask(hooks.specs.tunerkit_state, tuner.method, tuner=tuner)
        return found or State(tensors={}, values={})


@attrs.define(eq=False)
class Wrapped:
    """A wrapped model's record: its adapters, the active ones, and the base parameters that wrapping froze."""

    tuners: dict[str, Tuner] = attrs.field(factory=dict)  # by name, the oldest first
    active: tuple[str, ...] = ()  # the adapters that forward applies, in order
    frozen: tuple[str, ...] = ()  # the base parameters that wrapping froze
    told: set[str] = attrs.field(factory=set)  # the base parameters that `warn_of_base_changes` has named


def wrapped_of(model: nn.Module) -> Wrapped:
    """Return the record of ``model`` itself, not of modules around or inside it; an empty record if there is none."""
    found: Wrapped | None = vars(model).get(WRAPPED)
    return Wrapped() if found is None else found


def tuners_of(model: nn.Module) -> dict[str, Tuner]:
    """Return all tuners of ``model`` by adapter name, even if ``model`` contains the wrapped model, as DDP does.

    Raises `AdapterError` if several parts of the model were wrapped separately.
    """
    # By identity: a shallow copy shares the record.
    modules = base_modules(inside(model))
    roots = {id(found): (path, found) for path, module in modules if (found := vars(module).get(WRAPPED))}
    if len(roots) > 1:
        paths = ", ".join(repr(path) if path else "the model itself" for path, _ in roots.values())
        raise AdapterError(
            f"several parts of this {type(model).__name__} were wrapped separately: {paths}; pass one of them, or "
            "unwrap them and wrap the whole model"
        )
    return next((dict(found.tuners) for _, found in roots.values()), {})


def require_tuners(model: nn.Module) -> dict[str, Tuner]:
    """Return all tuners of ``model`` by adapter name. Raises `AdapterError` if the model has no adapter."""
    if not (tuners := tuners_of(model)):
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
            raise AdapterError(f"the model has several adapters: {', '.join(tuners)}; choose one with adapter=...")
        return next(iter(tuners.values()))
    if adapter not in tuple(tuners):  # a wrong argument may not be hashable
        hint = closest(str(adapter), tuners)
        raise AdapterError(f"no adapter named {adapter!r}; there are: {', '.join(tuners)}{hint}")
    return tuners[adapter]


def is_frozen(tuner: Tuner) -> bool:
    """Return whether the adapter has parameters and trains none of them."""
    own = [parameter.requires_grad for parameter in tuner.parameters()]
    return bool(own) and not any(own)
