"""``tunerkit sweep``: train each setting with each seed, score the same held-out rows, and say which to take."""

import gc
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import attrs
import numpy as np
from rich.console import Console

import tunerkit
from tunerkit import TunerkitError, serialization
from tunerkit.paths import few
from tunerkit_cli import outputs
from tunerkit_cli.folder import REPORT, RunFolder, as_json
from tunerkit_cli.preparing import checking
from tunerkit_cli.preparing.data import SPLIT_SEED, Data, prepare_data
from tunerkit_cli.preparing.session import Session, base_of
from tunerkit_cli.preparing.starting import head_labels, wrapped
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.report import wording
from tunerkit_cli.report.html.sweep import page
from tunerkit_cli.rows import DataError, split
from tunerkit_cli.running.run import run
from tunerkit_cli.running.training import reason_of
from tunerkit_cli.sweeping.grid import RATE, Arm, arms_of, rounds
from tunerkit_cli.sweeping.scoring import metric_of, row_scores
from tunerkit_cli.sweeping.sizes import contenders_of
from tunerkit_cli.sweeping.telling import Result, notes, panels, printed, sentence, table, value
from tunerkit_cli.tasks.base import Row, Task
from tunerkit_cli.tasks.metrics import refuse_unusable
from tunerkit_cli.telling import say
from tunerkit_transformers.output_folder import RECORD
from tunerkit_transformers.run_folder import RECIPE

PLAN: Final = "sweep.json"
RESULT: Final = "result.json"
SCORES: Final = "scores.json"
_LEAST_ROWS: Final = 4  # two for choosing, two for judging
_RATES: Final = (1 / 3, 1, 3)  # of the usual one


class SweepError(TunerkitError):
    """A sweep cannot be begun, gone on with, or ended."""


@attrs.frozen(eq=False)
class Plan:
    """A sweep as it began.

    Attributes:
        mapping: The recipe's mapping, without what varies.
        axes: The values of each key that varies, as texts.
        seeds: How many seeds each setting has.
        methods: The methods that are compared; empty if settings are.
        sizes: Their sizes, as ranks of LoRA; empty for those of the recipe.
        contenders: What is compared, as `contenders_of` returns it.
    """

    mapping: Mapping[str, Any]
    axes: Mapping[str, Sequence[str]]
    seeds: int
    methods: Sequence[str] = ()
    sizes: Sequence[int] = ()
    contenders: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)


def sweep(
    plan: Plan,
    out: Path,
    console: Console,
    *,
    resume: bool,
    hours: float | None = None,
    any_rate: bool = False,
    allow_code: bool = False,
) -> None:
    """Run a sweep, or go on with it, print the table and the sentence, and write the report.

    Args:
        plan: The plan; of a sweep that goes on, as `read_plan` returns it.
        out: The folder.
        console: Where to print.
        resume: Whether the folder has a sweep that goes on.
        hours: No run begins that would end later, as long as runs took so far.
        any_rate: Whether methods are compared at the best of three rates, around the recipe's or the task's usual one.
        allow_code: Whether the files of the recipe's metrics may run.

    Raises:
        SweepError: The folder has another sweep or other files, or the hours are too few.
        TunerkitError: As a training raises it, for what all runs have in common.
    """
    with outputs.claimed(out):
        if not resume:
            if any(out.iterdir()):
                raise SweepError(f"--out {out}: is not empty; go on with its sweep by --resume, or pass a new folder")
            _check(plan, out, allow_code=allow_code)
        first = _completed(arms_of(plan.mapping, plan.axes, plan.contenders or _unsized(plan))[0].recipe, out)
        refuse_unusable(first.metric or (), allow_code=allow_code)
        task, data = prepare_data(first, console)
        parts = _parted(data)
        if not resume:
            if any_rate:
                usual = first.training.get("learning_rate", task.defaults["learning_rate"])
                plan = attrs.evolve(plan, axes={RATE: [f"{usual * each:.3g}" for each in _RATES], **plan.axes})
            if plan.methods:
                plan = attrs.evolve(plan, contenders=_sized(plan, first, task, data, console))
            serialization.replace(out / PLAN, [as_json(attrs.asdict(plan)).encode()])
        runs = _Runs(plan, out, task, data, *parts, console)
        runs.train(hours)
        runs.conclude()


def read_plan(out: Path) -> Plan:
    """Read the plan of a sweep that goes on. Raises `SweepError`."""
    try:
        return Plan(**json.loads((out / PLAN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SweepError(f"--out {out}: there is no sweep to go on with ({PLAN} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise SweepError(f"{out / PLAN}: is damaged ({reason_of(problem)}); begin a new sweep") from problem


def _unsized(plan: Plan) -> dict[str, dict[str, Any]]:
    return contenders_of(plan.methods, (), {}, count=lambda method, settings: 0) if plan.methods else {}


def _completed(recipe: Recipe, out: Path) -> Recipe:
    return checking.completed(attrs.evolve(recipe, out=str(out / "run")), resume=False)


def _check(plan: Plan, out: Path, *, allow_code: bool) -> None:
    """Refuse a comparison of one, and check each recipe as its training would."""
    if len(plan.methods) * max(1, len(plan.sizes)) == 1:
        raise SweepError(
            f"nothing to compare {plan.methods[0]} with: name another of --methods or --sizes, or leave both out to "
            "compare its settings"
        )
    for arm in arms_of(plan.mapping, plan.axes, _unsized(plan)):
        recipe = attrs.evolve(arm.recipe, out=str(out / arm.folder))
        checking.check(recipe, resume=False, overwrite=False, allow_code=allow_code)
        _completed(arm.recipe, out)


def _sized(plan: Plan, recipe: Recipe, task: Task, data: Data, console: Console) -> Mapping[str, Mapping[str, Any]]:
    """Return the contenders, with the settings that give methods their sizes in the model that is trained."""
    if not plan.sizes:
        return _unsized(plan)
    labels, ordered = head_labels(None, task, data)
    loaded = base_of(recipe, task, None, console, labels=labels, ordered=ordered, seed=0)
    known: dict[str, int] = {}

    def count(method: str, settings: Mapping[str, Any]) -> int:
        if (key := repr((method, sorted(settings.items())))) not in known:
            wrapped(loaded, attrs.evolve(recipe, method=method, config=dict(settings)), {}, seed=0)
            known[key] = sum(tunerkit.trainable_parameters(loaded.model).adapters.values())
            tunerkit.unwrap(loaded.model)
        return known[key]

    return contenders_of(plan.methods, plan.sizes, recipe.config, count)


def _parted(data: Data) -> tuple[list[Row], list[Row]]:
    """Split the held-out rows into those that choose a setting, and those that judge the choice."""
    if len(data.held_out) < _LEAST_ROWS:
        raise DataError(
            f"{data.held_out_source}: {len(data.held_out)} held-out rows are too few for a sweep, which needs at least "
            f"{_LEAST_ROWS} and some hundreds to tell anything; pass more with --eval-data"
        )
    choosing, judging = split(data.held_out, train_rows=len(data.held_out) // 2, seed=SPLIT_SEED)
    return choosing, judging


@attrs.frozen(eq=False)
class _Runs:
    """The runs of a sweep, each in a folder of its own."""

    plan: Plan
    out: Path
    task: Task
    data: Data
    choosing: list[Row]
    judging: list[Row]
    console: Console
    failed: dict[str, str] = attrs.field(factory=dict)  # why a setting failed, by its name
    alive: dict[str, Sequence[Arm]] = attrs.field(factory=dict)  # those of each contender that are still in

    def __attrs_post_init__(self) -> None:
        self.alive.update(self.arms)

    @cached_property
    def arms(self) -> Mapping[str, Sequence[Arm]]:
        """The settings of each contender."""
        found: dict[str, list[Arm]] = {}
        for arm in arms_of(self.plan.mapping, self.plan.axes, self.plan.contenders):
            found.setdefault(arm.contender, []).append(arm)
        return found

    def train(self, hours: float | None) -> None:
        """Train what has not been trained yet, in rounds, after each of which the better settings go on.

        Raises:
            SweepError: The hours have passed, or allow not one run of each setting.
        """
        began, took = time.monotonic(), list[float]()
        plan = rounds(max(map(len, self.arms.values())), self.plan.seeds)
        new = [kept * (upto - before) for (kept, upto), (_, before) in zip(plan, [(0, 0), *plan], strict=False)]
        say(self.console, f"{sum(new) * len(self.arms)} runs, {self.plan.seeds} seeds, into {self.out}")
        halves = f"{len(self.choosing)} rows choose what to take, {len(self.judging)} others judge the choice"
        say(self.console, f"held out: {halves}")
        for place, (kept, upto) in enumerate(plan):
            if place:
                self.alive.update({name: self.ranked(name)[:kept] for name in self.arms})
            due = [
                (arm, number)
                for number in range(upto)
                for arms in self.alive.values()
                for arm in arms
                if not self.has_ended(arm, number)
            ]
            later = sum(new[place + 1 :]) * len(self.arms)
            for index, (arm, number) in enumerate(due):
                if arm.name in self.failed:
                    continue
                left = len(due) - index + later
                if hours is not None and took:
                    first = sum(each == 0 for _, each in due[index:])
                    self._refuse_longer(hours, time.monotonic() - began, took, left, first)
                start = time.monotonic()
                self._train(arm, number)
                took.append(time.monotonic() - start)
                if arm.name not in self.failed:
                    found = value(np.array([self.scores(arm, number)["choosing"]]), metric_of(self.task))
                    said = f"{metric_of(self.task)} {found}, {wording.duration(took[-1])}"
                    if left > 1:
                        rest = wording.duration((left - 1) * float(np.mean(took)))
                        said += f"; {left - 1} {'run' if left == 2 else 'runs'} left, about {rest}"
                    say(self.console, f"{arm.name}, seed {self.seed(arm, number)}: {said}")

    def conclude(self) -> None:
        """Print the table and the sentence, and write both and the report.

        Raises:
            SweepError: Fewer than two contenders have ended.
        """
        metric, results = metric_of(self.task), dict[str, Result]()
        for name in self.arms:
            arm = self.ranked(name)[0]
            if arm.name not in self.failed:
                results[name] = self._result(arm, range(self.plan.seeds))
        lost = [f"{name} ({why})" for name, why in self.failed.items()]
        if len(results) < 2:
            raise SweepError(f"fewer than two settings ended, so nothing can be compared; failed: {few(lost, shown=3)}")
        said = sentence(results, metric) + (f". Failed, and left out: {few(lost, shown=3)}" if lost else "")
        noted = notes(results, {name: [arm.rate for arm in arms if arm.rate] for name, arms in self.arms.items()})
        for each in noted:
            say(self.console, f"note: {each}")
        everything = {
            arm.name: self._result(arm, numbers)
            for arms in self.arms.values()
            for arm in arms
            if (numbers := [each for each in range(self.plan.seeds) if self.has_ended(arm, each)])
        }
        rows = table(results, metric)
        self.console.print(printed(rows))
        drawn = panels(everything, self.arms, metric)
        title = f"{len(self.arms)} {'methods' if self.plan.methods else 'settings'} compared"
        serialization.replace(self.out / REPORT, [page(title, said, noted, rows, drawn).encode()])
        summary = {"sentence": said, "notes": noted, "metric": metric, "failed": self.failed, "table": rows.rows}
        serialization.replace(self.out / RESULT, [as_json({**summary, "columns": rows.columns}).encode()])
        say(self.console, said)
        say(self.console, f"report: {self.out / REPORT}")

    def ranked(self, contender: str) -> Sequence[Arm]:
        """The settings of a contender that are still in, the best first by the rows for choosing."""

        def mean(arm: Arm) -> float:
            ended = [number for number in range(self.plan.seeds) if self.has_ended(arm, number)]
            if arm.name in self.failed or not ended:
                return -math.inf
            return round(float(np.mean([self.scores(arm, number)["choosing"] for number in ended])), 9)

        return sorted(self.alive[contender], key=mean, reverse=True)

    def seed(self, arm: Arm, number: int) -> int:
        """The seed of a setting's run, by its number."""
        return int(arm.recipe.training.get("seed", 0)) + number

    def folder(self, arm: Arm, number: int) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.out / arm.folder / f"seed-{self.seed(arm, number)}")

    def has_ended(self, arm: Arm, number: int) -> bool:
        """Whether a run has its record and its scores."""
        folder = self.folder(arm, number)
        return folder.has_ended and (folder / SCORES).is_file()

    def scores(self, arm: Arm, number: int) -> dict[str, Any]:
        """The scores of a run that has ended. Raises `SweepError` if they are of other rows."""
        path = self.folder(arm, number) / SCORES
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = len(found["choosing"]), len(found["judging"])
        if rows != (len(self.choosing), len(self.judging)):
            raise SweepError(
                f"{path}: has scores of {sum(rows)} rows, and {self.data.held_out_source} now has "
                f"{len(self.data.held_out)}; restore the data, or begin a new sweep"
            )
        return found

    def _result(self, arm: Arm, numbers: Iterable[int]) -> Result:
        """What is known of a setting from its runs."""
        numbers = [*numbers]
        scores = [self.scores(arm, each) for each in numbers]
        records = [json.loads((self.folder(arm, each) / RECORD).read_text(encoding="utf-8")) for each in numbers]
        return Result(
            np.array([each["choosing"] for each in scores]),
            np.array([each["judging"] for each in scores]),
            max(each["parameters"] for each in scores),
            float(np.mean([each["seconds"]["train"] for each in records])),
            arm.rate,
            arm.name.removeprefix(arm.contender).removeprefix(", "),
        )

    def _train(self, arm: Arm, number: int) -> None:
        """Train one run, or go on with it if it was interrupted."""
        seed, folder = self.seed(arm, number), self.folder(arm, number)
        training = {**arm.recipe.training, "seed": seed}
        recipe = attrs.evolve(arm.recipe, out=str(folder), training=training, baseline=False)
        resume = (folder / RECIPE).is_file() and folder.has_checkpoint
        data = attrs.evolve(self.data, held_out=self.choosing)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            recipe = checking.completed(recipe, resume=resume)
            after = partial(self._score, folder)
            quiet = Console(quiet=True)
            run(recipe, quiet, resume=resume, overwrite=not resume, prepared=(self.task, data), after=after)
        except Exception as problem:  # of one setting: the others go on
            self.failed[arm.name] = f"seed {seed}: {reason_of(problem)}"
            say(self.console, f"{arm.name}, seed {seed} failed: {reason_of(problem)}")
        gc.collect()

    def _score(self, folder: RunFolder, session: Session) -> None:
        """Write the scores of all held-out rows."""
        scores = {
            "choosing": row_scores(session, self.choosing).tolist(),
            "judging": row_scores(session, self.judging).tolist(),
            "parameters": tunerkit.trainable_parameters(session.loaded.model).trainable,
        }
        folder.write(SCORES, scores)

    def _refuse_longer(self, hours: float, gone: float, took: Sequence[float], left: int, first: int) -> None:
        """Raise if another run would end after the hours, or if not each setting can have one."""
        each = float(np.mean(took))
        if gone + first * each > 3600 * hours:
            least = math.ceil(100 * (gone + first * each) / 3600) / 100
            raise SweepError(
                f"--hours {hours:g} allow not one run of each setting, of {wording.duration(each)} each: go on with "
                f"tunerkit sweep --out {self.out} --resume --hours {least:g}, or more"
            )
        if gone + max(took) > 3600 * hours:
            raise SweepError(
                f"--hours {hours:g} have passed, and {left} runs are left, of {wording.duration(each)} each; go on "
                f"with: tunerkit sweep --out {self.out} --resume"
            )
