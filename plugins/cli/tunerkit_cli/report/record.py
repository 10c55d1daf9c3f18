"""The record of a run, ``run.json``, checked and structured."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import attrs
from cattrs import Converter

from tunerkit.errors import TunerkitError, first, shown
from tunerkit_cli.recipes.schema import class_schema, kinds_of, problems

Points = tuple[tuple[float, float], ...]
VERSION: Final = 1
GREATEST: Final = 1e100  # JSON also has integers that no float can hold


class RecordError(TunerkitError, ValueError):
    """The record of a run is damaged, or a newer tunerkit wrote it."""


@attrs.frozen
class Budget:
    """The budget when training began and ended, and what is live now, in ``unit``."""

    start: float | None = None
    end: float | None = None
    live: float | None = None
    unit: str = "rank"


@attrs.frozen
class Parameters:
    """Numbers of parameters: ``trained`` ones are those of the adapters, of copies of modules, and of biases."""

    trained: int | None = None
    all: int | None = None
    adapters: int | None = None
    copies: int | None = None
    biases: int | None = None


@attrs.frozen
class Change:
    """The budget and the ranks from a step on. The ranks are in the order of `Run.ranks`."""

    step: int
    ranks: tuple[int, ...] = ()
    budget: float | None = None


@attrs.frozen
class Baseline:
    """A simpler run that this one is compared with."""

    what: str = "baseline"
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    parameters: int | None = None
    seconds: float | None = None


@attrs.frozen
class Problem:
    """A sign that a run has learned nothing (``fatal``), or less than it should have."""

    kind: str  # such as "collapse"; docs/concepts/files.md lists them
    text: str  # the same in words, with the figures
    step: int | None = None  # at which it was seen; None if it is of the whole run
    learning_rate: float | None = None  # at that step
    advice: str = ""
    fatal: bool = True


@attrs.frozen
class Restart:
    """A restart: why, when it was seen, from which step (0 is the beginning), and the peak learning rate from there."""

    text: str
    step: int | None
    from_step: int
    learning_rate: float

    def __str__(self) -> str:
        where = f"step {self.from_step}" if self.from_step else "the beginning"
        return f"restarted from {where} at half the learning rate, {self.learning_rate:.3g}, because {self.text}"


@attrs.frozen
class Sample:
    """A prompt, with the model's answers before and after training."""

    prompt: str
    before: str | None = None
    after: str | None = None


@attrs.frozen
class Run:
    """A run as ``run.json`` records it. What the record lacks is empty or None."""

    version: int
    task: str
    method: str
    model: Mapping[str, Any] = attrs.field(factory=dict)
    data: Mapping[str, Any] = attrs.field(factory=dict)
    rows: Mapping[str, int] = attrs.field(factory=dict)
    held_out: Mapping[str, Any] = attrs.field(factory=dict)  # what is odd, such as rows that are trained too
    labels: tuple[str, ...] = ()
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    main_metric: str | None = None
    greater_is_better: bool | None = None
    logs: tuple[Mapping[str, Any], ...] = ()  # each with its ``step``; ``eval_…`` is measured on held-out rows
    seconds: Mapping[str, float] = attrs.field(factory=dict)
    device: str | None = None
    precision: str | None = None
    steps: int | None = None
    parameters: Parameters = Parameters()
    budget: Budget | None = None
    ranks: Mapping[str, int] = attrs.field(factory=dict)  # the live rank by target path
    caps: Mapping[str, int] = attrs.field(factory=dict)  # the greatest rank that a target may have
    stacks: Mapping[str, int] = attrs.field(factory=dict)  # the number of experts by path of their stack
    experts: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict)  # the live rank of each expert of a stack
    history: tuple[Change, ...] = ()
    spectrum: Mapping[str, tuple[float, ...]] = attrs.field(factory=dict)  # what each adapter adds, greatest first
    sizes: Mapping[str, int] = attrs.field(factory=dict)  # the live parameters of each adapter
    confusion: tuple[tuple[int, ...], ...] = ()  # true labels by predicted ones, in the order of ``labels``
    baseline: Baseline | None = None
    samples: tuple[Sample, ...] = ()
    problems: tuple[Problem, ...] = ()
    restarts: tuple[Restart, ...] = ()  # the oldest first
    config: Mapping[str, Any] = attrs.field(factory=dict)
    recipe: Mapping[str, Any] = attrs.field(factory=dict)
    environment: Mapping[str, Any] = attrs.field(factory=dict)
    conversations: bool | None = None  # whether a language model was trained on lists of messages
    left_out: Mapping[str, Mapping[str, int]] = attrs.field(factory=dict)  # for train and eval, by reason

    @cached_property
    def measured(self) -> Mapping[str, Points]:
        """The numbers in the logs over steps, by name; of rows with the same step, the last."""
        found: defaultdict[str, dict[float, float]] = defaultdict(dict)
        for row in self.logs:
            step: Any = row.get("step")
            if _is_number(step):
                for name, value in row.items():
                    if _is_number(value):
                        found[name][float(step)] = float(value)
        return {name: tuple(sorted(values.items())) for name, values in found.items()}


def _is_number(value: Any) -> bool:
    return type(value) in (float, int) and abs(value) <= GREATEST


def read(record: Mapping[str, Any], source: str = "") -> Run:
    """Check a record and structure it, without unknown keys. `RecordError` has the first problems, and the source."""
    at = f"{source}: " if source else ""
    if not isinstance(record, Mapping):
        raise RecordError(f"{at}expected a record of a run, which is a mapping, got {shown(record)}")
    version = record.get("version")
    if version != VERSION:
        got = f"version {shown(version)}" if "version" in record else "no version"
        raise RecordError(
            f"{at}expected a record of version {VERSION}, got {got}; "
            "use the tunerkit that wrote it, or write it again with `tunerkit train`"
        )
    given = {name: value for name, value in record.items() if value is not None}
    if not (found := [*problems(given, _SCHEMA, "run")]):
        run = _CONVERTER.structure(given, Run)
        found = _misfits(run)
    if found:
        listed = "; ".join(first(found, 5))
        raise RecordError(f"{at}{listed}; restore the file as `tunerkit train` wrote it, or train again")
    return run


def _misfits(run: Run) -> list[str]:
    """Parts of a record that have the right types, but contradict each other."""
    count, width = len(run.ranks), len(run.confusion)
    odd = [change.step for change in run.history if len(change.ranks) != count]
    found = [f"run.history has other ranks than the {count} of run.ranks at step {odd[0]}"] if odd else []
    if any(len(row) != width for row in run.confusion):
        found.append(f"run.confusion is not square: it has {width} rows")
    elif width and run.labels and len(run.labels) != width:
        found.append(f"run.confusion has {width} rows, and run.labels has {len(run.labels)} names")
    return found


def _opened(schema: Any) -> Any:
    """The schema of a class as records need it: others may have added keys, and a float holds each number."""
    if not isinstance(schema, dict):
        return schema
    opened = {name: _opened(each) for name, each in schema.items()}
    if "type" in schema and {"number", "integer"} & {*kinds_of(schema)}:
        opened |= {"minimum": -GREATEST, "maximum": GREATEST}
    return {**opened, "additionalProperties": True} if schema.get("additionalProperties") is False else opened


_SCHEMA: Final = _opened(class_schema(Run))
_CONVERTER: Final = Converter()
_CONVERTER.register_structure_hook(float, lambda value, _: value)  # a whole number stays one
