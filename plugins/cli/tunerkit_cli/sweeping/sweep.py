"""``tunerkit sweep``: train each setting with each seed, score the same held-out rows, and say which to take."""

import gc
import json
import math
import shlex
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
from tunerkit_cli.folder import REPORT, RunFolder, as_json, digests_of
from tunerkit_cli.preparing import checking
from tunerkit_cli.preparing.data import SPLIT_SEED, Data, prepare_data
from tunerkit_cli.preparing.session import Session, base_of
from tunerkit_cli.preparing.starting import head_labels, wrapped
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.report import wording
from tunerkit_cli.rows import DataError, split
from tunerkit_cli.running.record import Trained
from tunerkit_cli.running.run import run
from tunerkit_cli.running.training import reason_of
from tunerkit_cli.sweeping.grid import RATE, Arm, Plan, arms_of, refuse_sizes, rounds
from tunerkit_cli.sweeping.scoring import metric_of, refuse_unlike, row_scores
from tunerkit_cli.sweeping.sizes import contenders_of
from tunerkit_cli.sweeping.telling import Result, chosen, notes, page, panels, printed, sentence, table, value, values
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


class HoursError(SweepError):
    """The hours of a sweep have passed, or are too few."""


def sweep(
    plan: Plan,
    out: Path,
    console: Console,
    *,
    resume: bool,
    hours: float | None = None,
    allow_code: bool = False,
) -> None:
    """Run a sweep, or go on with it, print the table and the sentence, and write the report.

    Args:
        plan: The plan; of a sweep that goes on, as `read_plan` returns it.
        out: The folder.
        console: Where to print.
        resume: Whether the folder has a sweep that goes on.
        hours: No run begins that would end later, as long as runs took so far.
        allow_code: Whether the files of the recipe's metrics may run.

    Raises:
        SweepError: The folder has another sweep or other files, or the hours are too few.
        TunerkitError: As a training raises it, for what all runs have in common.
    """
    again = shlex.join(["tunerkit", "sweep", "--out", str(out), "--resume", *(["--allow-code"] if allow_code else [])])
    with outputs.claimed(out):
        if not resume:
            if any(out.iterdir()):
                raise SweepError(f"--out {out}: is not empty; go on with its sweep by --resume, or pass a new folder")
            _check(plan, out, allow_code=allow_code)
        first = _completed(arms_of(plan.mapping, plan.axes, plan.contenders or _unsized(plan))[0].recipe, out)
        refuse_unusable(first.metric or (), allow_code=allow_code)
        task, data = prepare_data(first, console)
        refuse_unlike(task, plan.axes)
        parts = _parted(data)
        digests = digests_of(first)
        if not resume:
            if plan.searches_rates:
                usual = first.training.get("learning_rate", task.defaults["learning_rate"])
                plan = attrs.evolve(plan, axes={RATE: [f"{usual * each:.3g}" for each in _RATES], **plan.axes})
            if plan.methods:
                plan = attrs.evolve(plan, contenders=_sized(plan, first, task, data, console))
            plan = attrs.evolve(plan, digests=digests)
            arms_of(plan.mapping, plan.axes, plan.contenders)  # refuses settings that are the same
        elif changed := [path for path, digest in digests.items() if plan.digests.get(path) != digest]:
            raise SweepError(f"{changed[0]}: has changed since this sweep began; restore it, or begin a new sweep")
        serialization.replace(out / PLAN, [as_json(attrs.asdict(plan)).encode()])
        runs = _Runs(plan, out, task, data, *parts, console, again=again)
        try:
            runs.train(hours)
        except HoursError:
            if seeds := runs.common_seeds():
                say(console, f"so far, with {seeds} {'seed' if seeds == 1 else 'seeds'}:")
                runs.conclude(seeds)
            raise
        runs.conclude()


def read_plan(out: Path, seeds: int | None = None) -> Plan:
    """Read the plan of a sweep that goes on, perhaps with more seeds. Raises `SweepError`."""
    try:
        plan = Plan(**json.loads((out / PLAN).read_text(encoding="utf-8")))
        if seeds is not None and seeds < plan.seeds:
            raise SweepError(f"--seeds {seeds}: the sweep in {out} has {plan.seeds} seeds, and can have more alone")
        return plan if seeds is None else attrs.evolve(plan, seeds=seeds)
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
    if plan.sizes:
        refuse_sizes(plan.axes, plan.mapping.get("config") or {})
    if plan.methods and plan.mapping.get("from_adapter") is not None:
        raise SweepError("--methods compares new adapters, and from_adapter goes on with one; leave one of them out")
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
    again: str  # the command that goes on
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
        seeds = f"{self.plan.seeds} {'seed' if self.plan.seeds == 1 else 'seeds'}"
        say(self.console, f"{sum(new) * len(self.arms)} runs, {seeds}, into {self.out}")
        halves = f"{len(self.choosing)} rows choose what to take, {len(self.judging)} others judge the choice"
        say(self.console, f"held out: {halves}")
        for place, (kept, upto) in enumerate(plan):
            if place:
                self.alive.update({name: self.ranked(name, plan[place - 1][1])[:kept] for name in self.arms})
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
                if self._left() < 2:
                    return
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

    def conclude(self, seeds: int | None = None) -> None:
        """Print the table and the sentence, and write both and the report.

        Args:
            seeds: With how many seeds; None for all.

        Raises:
            SweepError: Fewer than two contenders have ended.
        """
        lost = [f"{name} ({why})" for name, why in self.failed.items()]
        if self._left() < 2:
            raise SweepError(f"fewer than two settings are left to compare; failed: {few(lost, shown=3)}")
        seeds = self.plan.seeds if seeds is None else seeds
        metric, results, best = metric_of(self.task), dict[str, Result](), dict[str, Arm]()
        for name in self.arms:
            arm = self.ranked(name, seeds)[0]
            if arm.name not in self.failed:
                results[name], best[name] = self._result(arm, range(seeds)), arm
        said = sentence(results, metric) + (f". Failed, and left out: {few(lost, shown=3)}" if lost else "")
        of_rates = [*best] if self.plan.methods else [chosen(results).best]
        rates = {
            name: [
                arm.rate for arms in self.arms.values() for arm in arms if arm.group == best[name].group and arm.rate
            ]
            for name in of_rates
        }
        noted = notes(results, rates)
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
        summary = {"sentence": said, "notes": noted, "metric": metric, "failed": self.failed, "seeds": seeds}
        serialization.replace(self.out / RESULT, [as_json({**summary, "settings": values(results, metric)}).encode()])
        say(self.console, said)
        say(self.console, f"report: {self.out / REPORT}")

    def ranked(self, contender: str, seeds: int) -> Sequence[Arm]:
        """The settings of a contender that are still in, the best first by the rows for choosing."""

        def mean(arm: Arm) -> float:
            if arm.name in self.failed:
                return -math.inf
            return round(float(np.mean([self.scores(arm, number)["choosing"] for number in range(seeds)])), 9)

        return sorted(self.alive[contender], key=mean, reverse=True)

    def seed(self, arm: Arm, number: int) -> int:
        """The seed of a setting's run, by its number."""
        return int(arm.recipe.training.get("seed") or 0) + number

    def folder(self, arm: Arm, number: int) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.out / arm.folder / f"seed-{self.seed(arm, number)}")

    def has_ended(self, arm: Arm, number: int) -> bool:
        """Whether a run has its record and its scores."""
        folder = self.folder(arm, number)
        return folder.has_ended and (folder / SCORES).is_file()

    def scores(self, arm: Arm, number: int) -> dict[str, Any]:
        """The scores of a run that has ended."""
        found: dict[str, Any] = json.loads((self.folder(arm, number) / SCORES).read_text(encoding="utf-8"))
        return found

    def common_seeds(self) -> int:
        """With how many seeds, from the first on, all settings that are still in have ended."""
        alive = [arm for arms in self.alive.values() for arm in arms if arm.name not in self.failed]
        return min(
            next((n for n in range(self.plan.seeds) if not self.has_ended(arm, n)), self.plan.seeds) for arm in alive
        )

    def _left(self) -> int:
        """How many contenders have a setting that has not failed."""
        return sum(any(arm.name not in self.failed for arm in arms) for arms in self.arms.values())

    def _result(self, arm: Arm, numbers: Iterable[int]) -> Result:
        """What is known of a setting from its runs."""
        numbers = [*numbers]
        scores = [self.scores(arm, each) for each in numbers]
        if len({(len(each["choosing"]), len(each["judging"])) for each in scores}) > 1:
            raise SweepError(f"{arm.name}: its runs leave out different rows, so their losses cannot be compared")
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
        # One that ended without its scores could not be evaluated, and is trained anew.
        resume = (folder / RECIPE).is_file() and folder.has_checkpoint and not folder.has_ended
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

    def _score(self, folder: RunFolder, session: Session, trained: Trained) -> None:
        """Write the scores of all held-out rows."""
        scores = {
            "choosing": row_scores(session, self.choosing, trained.right).tolist(),
            "judging": row_scores(session, self.judging).tolist(),
            "parameters": tunerkit.trainable_parameters(session.loaded.model).trainable,
        }
        folder.write(SCORES, scores)

    def _refuse_longer(self, hours: float, gone: float, took: Sequence[float], left: int, first: int) -> None:
        """Raise if another run would end after the hours, or if not each setting can have one."""
        each = float(np.mean(took))
        if gone + first * each > 3600 * hours:
            least = math.ceil(100 * (gone + first * each) / 3600) / 100
            raise HoursError(
                f"--hours {hours:g} allow not one run of each setting, of {wording.duration(each)} each: go on with "
                f"{self.again} --hours {least:g}, or more"
            )
        if gone + max(took) > 3600 * hours:
            raise HoursError(
                f"--hours {hours:g} have passed, and {left} runs are left, of {wording.duration(each)} each; go on "
                f"with: {self.again}"
            )
