"""Metrics of predictions that a recipe adds to its task's: of generated texts, by name, or functions in files."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import SimpleNamespace
from typing import Any, Final
from unicodedata import category

import attrs

from tunerkit.errors import ConfigError
from tunerkit_cli.report.record import GREATEST
from tunerkit_cli.rows import split
from tunerkit_cli.tasks import GENERATED
from tunerkit_cli.tasks.base import Row, Task, require_package
from tunerkit_cli.tasks.functions import Function, function_of, refuse_code, refuse_namesakes
from tunerkit_cli.tasks.generating import NEW_TOKENS, Answering
from tunerkit_cli.tasks.language import GenerationTask
from tunerkit_transformers.pretrained import Pretrained

_ROWS: Final = 100  # that a language model answers
# What is compared of a row, or of its prediction.
_ANSWERS: Final = ("messages", "completion", "target", "tags", "labels", "value", "label")


def _exact_match(given: list[str], right: list[str]) -> float:
    return fmean(one.strip() == other.strip() for one, other in zip(given, right, strict=True))


def _words(text: str) -> list[str]:
    """Letters and digits, with the marks on them; of a text without them what is between spaces, as of emoji."""
    spaced = "".join(each if each.isalnum() or category(each)[0] == "M" else " " for each in text.lower())
    return re.findall(r"[^\W_]\S*", spaced) or text.split()


def _rouge_l(given: list[str], right: list[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    words = SimpleNamespace(tokenize=_words)  # its own tokenizer knows the letters a to z alone
    return fmean(each["rougeL"].fmeasure for each in map(RougeScorer(["rougeL"], tokenizer=words).score, right, given))


def _chrf(given: list[str], right: list[str]) -> float:
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(given, [right]).score)


_NAMED: Final[Mapping[str, Function]] = {"exact_match": _exact_match, "rouge_l": _rouge_l, "chrf": _chrf}
_PACKAGES: Final = {"rouge_l": "rouge_score", "chrf": "sacrebleu"}


def refuse_unusable(metrics: Sequence[str], best: object = None, *, allow_code: bool = False) -> None:
    """Raise `TunerkitError` if a metric does not exist, may not run, or chooses the ``best`` and is not measured."""
    wanted, names = str(best).removeprefix("eval_"), [metric.rpartition(":")[2] for metric in metrics]
    if wanted in _NAMED and wanted not in names:
        raise ConfigError([f"training.metric_for_best_model: {wanted} is not measured; set metric: {wanted} too"])
    refuse_namesakes("metric", [*dict.fromkeys(metrics)])
    for metric in metrics:
        refuse_code("metric", metric, allowed=allow_code)
        if metric in _PACKAGES:
            require_package(_PACKAGES[metric], f"metric: {metric}", "metrics")
        function_of("metric", metric, _NAMED)


def refuse_unfit(metrics: Sequence[str], task: Task) -> None:
    """Raise `ConfigError` if a metric is of generated texts, and the task generates none, or is called as its own."""
    for metric in metrics:
        if metric in _NAMED and task.name not in GENERATED:
            raise ConfigError([f"metric: {metric} is for {' and '.join(GENERATED)}, and the task is {task.name}"])
        if (name := metric.rpartition(":")[2]) in task.measures:
            raise ConfigError([f"metric: {metric}: {task.name} has a metric {name} already; rename the function"])


@attrs.frozen(eq=False)
class Measure:
    """Metrics by name, as functions of predictions and references, and the rows that are predicted for them."""

    functions: Mapping[str, Function] = attrs.field(factory=dict)
    rows: Sequence[Row] = ()

    def __str__(self) -> str:
        return f"{', '.join(self.functions)} on {(n := len(self.rows))} held-out row{'' if n == 1 else 's'}"

    def of(self, task: Task, loaded: Pretrained, *, batch_size: int) -> dict[str, float]:
        """The metrics of a model, which is in evaluation mode then. Raises `ValueError` if one fails."""
        from tunerkit_transformers.agreement import gathered  # imports torch

        if not self.functions:
            return {}
        right, options, found, failures = [*map(_answer, self.rows)], {}, {}, []
        if isinstance(task, GenerationTask):  # an answer may be as long as the longest one
            options["answering"] = Answering(max(NEW_TOKENS, *map(len, loaded.processor(right)["input_ids"])))
        given = [_answer(each) for each in task.predict(loaded, self.rows, batch_size=batch_size, **options)]
        for name, function in self.functions.items():
            try:
                found[name] = float(function([*given], [*right]))
                if not abs(found[name]) <= GREATEST:  # also if it is NaN
                    failures.append(f"metric {name} returned {found[name]}, which is not finite")
            except (Exception, SystemExit) as problem:  # of code that is not ours
                failures.append(f"metric {name} failed: {type(problem).__name__}: {problem}")
        found, failures = gathered((found, failures))[0]  # of the first process: all must decide the same
        if failures:
            raise ValueError("; ".join(failures))
        return found


def measure_of(metrics: Sequence[str], task: Task, rows: Sequence[Row], most: int | None) -> Measure:
    """Read the functions of metrics, and draw up to ``most`` rows with an answer. Raises `ConfigError`."""
    if not metrics:
        return Measure()
    refuse_unfit(metrics, task)
    kept = [row for row in rows if _answer(row) not in (None, "")]
    if not kept:
        why = "no held-out row has an answer that could be compared" if rows else "there are no held-out rows"
        raise ConfigError([f"metric: {why}; leave metric out"])
    count = most or (_ROWS if isinstance(task, GenerationTask) else len(kept))
    functions = dict(function_of("metric", metric, _NAMED) for metric in metrics)
    return Measure(functions, split(kept, train_rows=count, seed=0)[0])


def _answer(given: Mapping[str, Any]) -> Any:
    """The answer in a row or a prediction: of a conversation the assistant's last one, else None."""
    found = next((given[name] for name in _ANSWERS if name in given), None)
    if isinstance(found, list) and found and isinstance(found[-1], dict):
        return found[-1]["content"] if found[-1]["role"] == "assistant" else None
    return found
