"""Metrics of predictions that a recipe adds to its task's: of generated texts, by name, or functions in files."""

import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, Final

import attrs

from tunerkit.errors import ConfigError, FileError, closest, shown
from tunerkit_cli.report.record import GREATEST
from tunerkit_cli.rows import split
from tunerkit_cli.tasks import GENERATED
from tunerkit_cli.tasks.base import Row, Task, require_package
from tunerkit_cli.tasks.generating import NEW_TOKENS, Answering
from tunerkit_cli.tasks.language import GenerationTask
from tunerkit_transformers.pretrained import Pretrained, closest_path

_ROWS: Final = 100  # that a language model answers
# What is compared of a row, or of its prediction.
_ANSWERS: Final = ("messages", "completion", "target", "tags", "labels", "value", "label")
Function = Callable[[list[Any], list[Any]], Any]  # of predictions and references, in the same order


def _exact_match(given: list[str], right: list[str]) -> float:
    return fmean(one.strip() == other.strip() for one, other in zip(given, right, strict=True))


def _rouge_l(given: list[str], right: list[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    # Its own tokenizer knows the letters a to z alone.
    words = SimpleNamespace(tokenize=lambda text: re.findall(r"[^\W_]+", text.lower()))
    return fmean(each["rougeL"].fmeasure for each in map(RougeScorer(["rougeL"], tokenizer=words).score, right, given))


def _chrf(given: list[str], right: list[str]) -> float:
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(given, [right]).score)


_NAMED: Final[Mapping[str, Function]] = {"exact_match": _exact_match, "rouge_l": _rouge_l, "chrf": _chrf}
_PACKAGES: Final = {"rouge_l": "rouge_score", "chrf": "sacrebleu"}


def refuse_unusable(metrics: Sequence[str], best: object = None, *, allow_code: bool = False) -> None:
    """Raise `TunerkitError` if a metric does not exist, may not run, or chooses the ``best`` and is not measured."""
    wanted = str(best).removeprefix("eval_")
    if wanted in _NAMED and wanted not in metrics:
        raise ConfigError([f"training.metric_for_best_model: {wanted} is not measured; set metric: {wanted} too"])
    for metric in metrics:
        path = metric.rpartition(":")[0]
        if path and not Path(path).is_file():
            raise FileError(f"metric: {path}: no such file{closest_path(path)}")
        if path and not allow_code:
            raise ConfigError([f"metric: {metric} is code; read it, and pass --allow-code to run it"])
        if not path and metric not in _NAMED:
            hint = closest(metric.casefold(), _NAMED) or f"; pass one of {', '.join(_NAMED)}, or FILE.py:FUNCTION"
            raise ConfigError([f"metric: there is none named {shown(metric)}{hint}"])
        if metric in _PACKAGES:
            require_package(_PACKAGES[metric], f"metric: {metric}", "metrics")
        _function(metric)


def refuse_unfit(metrics: Sequence[str], task: str) -> None:
    """Raise `ConfigError` if a metric is of generated texts, and the task generates none."""
    if task not in GENERATED and (named := [metric for metric in metrics if metric in _NAMED]):
        raise ConfigError([f"metric: {named[0]} is for {' and '.join(GENERATED)}, and the task is {task}"])


@attrs.frozen(eq=False)
class Measure:
    """Metrics by name, as functions of predictions and references, and the rows that are predicted for them."""

    functions: Mapping[str, Function] = attrs.field(factory=dict)
    rows: Sequence[Row] = ()

    def __str__(self) -> str:
        return f"{', '.join(self.functions)} on {len(self.rows)} held-out rows"

    def of(self, task: Task, loaded: Pretrained, *, batch_size: int) -> dict[str, float]:
        """The metrics of a model, which is in evaluation mode then. Raises `ValueError` if one fails."""
        if not self.functions:
            return {}
        right, options, found = [*map(_answer, self.rows)], {}, {}
        if isinstance(task, GenerationTask):  # an answer may be as long as the longest one
            longest = max(map(len, loaded.processor(right)["input_ids"]))
            options["answering"] = Answering(max(NEW_TOKENS, longest))
        given = [_answer(each) for each in task.predict(loaded, self.rows, batch_size=batch_size, **options)]
        for name, function in self.functions.items():
            try:
                found[name] = float(function([*given], [*right]))
            except (Exception, SystemExit) as problem:  # of code that is not ours
                raise ValueError(f"metric {name} failed: {type(problem).__name__}: {problem}") from problem
            if not abs(found[name]) <= GREATEST:  # also if it is NaN
                raise ValueError(f"metric {name} returned {found[name]}, which is not finite")
        return found


def measure_of(metrics: Sequence[str], task: Task, rows: Sequence[Row], most: int | None) -> Measure:
    """Read the functions of metrics, and draw up to ``most`` rows with an answer. Raises `ConfigError`."""
    if not metrics:
        return Measure()
    refuse_unfit(metrics, task.name)
    kept = [row for row in rows if _answer(row) not in (None, "")]
    if not kept:
        raise ConfigError(["metric: no held-out row has an answer that could be compared; leave metric out"])
    count = most or (_ROWS if isinstance(task, GenerationTask) else len(kept))
    return Measure(dict(map(_function, metrics)), split(kept, train_rows=count, seed=0)[0])


def _function(metric: str) -> tuple[str, Function]:
    """The name of a metric, and its function, whose file is run for it."""
    path, _, name = metric.rpartition(":")
    try:
        found = {key: each for key, each in runpy.run_path(path).items() if callable(each)} if path else _NAMED
    except (Exception, SystemExit) as problem:
        raise ConfigError([f"metric: {path} cannot be run: {type(problem).__name__}: {problem}"]) from problem
    if name not in found:
        raise ConfigError([f"metric: {path} has no function {shown(name)}{closest(name, found)}"])
    return name, found[name]


def _answer(given: Mapping[str, Any]) -> Any:
    """The answer in a row or a prediction: of a conversation the assistant's last one, else None."""
    found = next((given[name] for name in _ANSWERS if name in given), None)
    if isinstance(found, list) and found and isinstance(found[-1], dict):
        return found[-1]["content"] if found[-1]["role"] == "assistant" else None
    return found
