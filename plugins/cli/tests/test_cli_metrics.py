"""Metrics of predictions: by name and functions of the user's, at the end and where they choose the best checkpoint."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.tiny_models import save_tiny_llama, save_tiny_t5
from tests.support.train_command import arguments_of as classifier, command, record_of, signalled, succeeded
from tunerkit.errors import ConfigError
from tunerkit_cli.tasks import metrics, task_of
from tunerkit_cli.tasks.functions import _functions
from tunerkit_cli.tasks.metrics import _NAMED, Measure, measure_of, refuse_unusable
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin
from tunerkit_transformers import agreement

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "command.md"
CODE = """
import beside

print(beside.SAID)
calls = 0

def words(predictions, references):
    global calls
    calls += 1
    assert len(predictions) == len(references) > 0
    return -calls if {*map(type, predictions + references)} == {str} else 0

def fails(predictions, references):
    return 1 / 0

def nan(predictions, references):
    return float("nan")

def text(predictions, references):
    return "good"
"""
TEXTS = [
    "the film is good",
    "a good film",
    "für die Überraschung",
    "the the plot",
    "",
    "bad",
    "!!!",
    "🎉 ❤️",
    "☀️",
    "नमस्ते दुनिया",
]


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(LowRankPlugin()):
        yield


@pytest.fixture(autouse=True)
def _afresh() -> None:
    """As in another process."""
    _functions.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, rows, and a file with functions."""
    folder = tmp_path_factory.mktemp("metrics")
    save_tiny_llama(folder / "llama")
    save_tiny_t5(folder / "t5")
    (folder / "own.py").write_text(CODE, encoding="utf-8")
    (folder / "beside.py").write_text("SAID = 'own.py is run'", encoding="utf-8")
    chats = [[{"role": role, "content": "good film"} for role in ("user", "assistant")[:n]] for n in (2, 2, 2, 1)]
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": [{"prompt": "the film ", "completion": "very good"}] * 8,
        "chats": [{"messages": chat} for chat in chats * 2],
        "translations": [{"source": "the film", "target": "good plot"}] * 8,
        "texts": [{"text": "the film is good"}] * 8,
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    return folder


def arguments_of(folder: Path, data: str, *settings: str) -> list[object]:
    """A run of four steps in two epochs, whose held-out rows are those of training."""
    file = folder / f"{data}.jsonl"
    return [
        *("train", "--method", "toy-low-rank", "--config", "{rank: 2}", "--lr", "0.05", "--epochs", "2"),
        *("--precision", "fp32", "--batch-size", "4", "--data", file, "--eval-data", file),
        *("--model", folder / ("t5" if data == "translations" else "llama")),
        *(word for each in settings for word in ("--set", each)),
    ]


def longest_common(one: list[str], other: list[str]) -> int:
    """The length of the longest sequence of words that is in both, by its definition."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + longest_common(one[1:], other[1:])
    return max(longest_common(one[1:], other), longest_common(one, other[1:]))


@pytest.mark.parametrize("name", ["exact_match", "rouge_l", "chrf"])
def test_a_metric_by_name_is_as_it_is_defined(name: str) -> None:
    """Law: equal texts have the best value, in every language; ROUGE-L is F1 of the longest common words."""
    if name != "exact_match":
        pytest.importorskip({"rouge_l": "rouge_score", "chrf": "sacrebleu"}[name], reason="needs the extra [metrics]")
    metric, full = _NAMED[name], [text for text in TEXTS if text]
    assert metric(full, [f" {text}\n" for text in full]) == pytest.approx(100 if name == "chrf" else 1)
    found = {(one, other): metric([one], [other]) for one in TEXTS for other in full}
    assert all(value < 1 or one == other or name == "chrf" for (one, other), value in found.items())
    for (one, other), value in found.items() if name == "rouge_l" else ():
        first, second = one.split(), other.split()
        assert value == pytest.approx(2 * longest_common(first, second) / (len(first) + len(second)))


def test_a_metric_that_chooses_is_measured_at_each_evaluation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: the best checkpoint has its best value, resumed or not; --resume asks for --allow-code again."""
    monkeypatch.chdir(folder)
    best = ("load_best_model_at_end=true", "metric_for_best_model=words")
    out, settings = tmp_path / "out", ("metric=[own.py:words, exact_match]", "metric_rows=3", *best)
    arguments = [*arguments_of(folder, "chats", *settings), "--out", out, "--allow-code"]
    with signalled(3, signal.SIGINT):
        assert command(*arguments).exit_code == 130
    _functions.cache_clear()
    monkeypatch.chdir(tmp_path)
    asked = command("train", "--out", out, "--resume")
    assert (asked.exit_code, asked.stderr.count("\n"), "--allow-code" in asked.stderr) == (2, 1, True)
    said = succeeded("train", "--out", out, "--resume", "--allow-code").output
    assert "metric: words, exact_match on 3 held-out rows\n" in said
    assert said.count("own.py is run") == 1
    assert "(words, exact_match on 3 held-out rows)\n" in said
    record = record_of(out)
    assert record["metric_rows"] == 3
    assert {"loss", "perplexity", "exact_match"} < {*record["metrics"]}
    # Each process begins to count anew: the values are -1 in the first epoch, and -1 and -2 after it was resumed.
    assert [(each["step"], each["eval_words"]) for each in record["logs"] if "eval_words" in each] == [(2, -1), (4, -1)]
    assert record["metrics"]["words"] == -2
    found = json.loads(succeeded("eval", out, "--data", folder / "chats.jsonl").output)
    assert {"metric_rows": 3, "exact_match": record["metrics"]["exact_match"]}.items() <= found.items()
    assert "words" not in found
    monkeypatch.setattr(metrics, "_PACKAGES", {"chrf": "not_installed"})
    record["recipe"]["metric"].append("chrf")
    (out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    done = succeeded("eval", out, "--data", folder / "chats.jsonl")
    assert "note: chrf is not measured: metric: chrf needs not_installed" in done.stderr
    assert json.loads(done.stdout)["exact_match"] == found["exact_match"]


def test_a_metric_is_measured_once_where_it_does_not_choose(folder: Path, tmp_path: Path) -> None:
    """At the end, in the record and in the report; a seq2seq model writes its answers too."""
    out = tmp_path / "out"
    settings = (f"metric=[exact_match, {folder / 'own.py'}:words]", "eval_strategy=epoch")
    succeeded(*arguments_of(folder, "translations", *settings), "--out", out, "--allow-code")
    record = record_of(out)
    assert (record["metrics"]["words"], record["metric_rows"]) == (-1, 8)
    assert not any("eval_words" in each for each in record["logs"])
    assert "exact match" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "metric fails failed: ZeroDivisionError: division by zero"),
        ("nan", "metric nan returned nan, which is not finite"),
        ("text", "metric text failed: ValueError: could not convert string to float: 'good'"),
    ],
)
def test_a_metric_that_fails_loses_nothing(name: str, message: str, folder: Path, tmp_path: Path) -> None:
    """Law: the adapter is written first, with a record of the other metrics; where it chooses, the adapter as it is."""
    metric = f"metric={folder / 'own.py'}:{name}"
    for place, settings in {"end": (), "best": (f"training.metric_for_best_model={name}",)}.items():
        out = tmp_path / place
        done = command(*arguments_of(folder, "pairs", metric, *settings), "--out", out, "--allow-code")
        assert (done.exit_code, done.stderr.count("\n"), message in done.stderr) == (2, 1, True), done.stderr
        assert (out / "adapter.safetensors").is_file()
    assert {*record_of(tmp_path / "end")["metrics"]} >= {"loss", "perplexity"}


@pytest.mark.parametrize(("name", "hint"), [("word", "did you mean "), ("eval_bleu", "there are words, loss, ")])
def test_a_metric_that_is_not_measured_cannot_choose(name: str, hint: str, folder: Path, tmp_path: Path) -> None:
    """One line at the first evaluation, with the closest name, as metrics are known then; the adapter is written."""
    settings = (
        f"metric={folder / 'own.py'}:words",
        f"metric_for_best_model={name}",
        "eval_strategy=steps",
        "eval_steps=1",
    )
    done = command(*arguments_of(folder, "pairs", *settings), "--out", tmp_path / "out", "--allow-code")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"training.metric_for_best_model: no evaluation has {name!r}; {hint}" in done.stderr
    assert "runtime" not in done.stderr
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_rows_without_answers_have_no_metric(folder: Path, tmp_path: Path) -> None:
    """One line before the model is loaded."""
    done = command(*arguments_of(folder, "texts", "metric=exact_match"), "--out", tmp_path / "out")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "metric: no held-out row has an answer that could be compared; leave metric out" in done.stderr
    with pytest.raises(ConfigError, match="there are no held-out rows; leave metric out"):
        measure_of(["exact_match"], task_of("seq2seq"), [], None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["metric=[rouge_l, own.py:rouge_l]"],
            "metric: rouge_l and {}own.py:rouge_l have the same name; rename a function",
        ),
        (["metric=own.py:loss"], "metric: {}own.py:loss: causal-lm has a metric loss already; rename the function"),
        (["metric=own.py:perplexity"], "own.py:perplexity: causal-lm has a metric perplexity already"),
        (["metric_rows=5"], "metric_rows: no metric is measured on them; set metric too, or leave metric_rows out"),
        ([f"metric={'a' * 5000}.py:words"], "aaa.py: no such file"),
    ],
)
def test_what_would_be_lost_is_refused(settings: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    """One line before the training; a metric of the user's may be called as one with a name, and choose."""
    pytest.importorskip("rouge_score", reason="needs the extra [metrics]")
    (tmp_path / "own.py").write_text("rouge_l = loss = perplexity = lambda given, right: 0.5", encoding="utf-8")
    settings = [each.replace("own.py", f"{tmp_path / 'own.py'}") for each in settings]
    done = command(*arguments_of(folder, "pairs", *settings), "--out", tmp_path / "out", "--allow-code")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert message.format(f"{tmp_path}/") in done.stderr
    refuse_unusable([f"{tmp_path / 'own.py'}:rouge_l"], "rouge_l", allow_code=True)


@pytest.mark.parametrize("is_failure", [False, True])
def test_processes_decide_by_the_values_of_the_first(is_failure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a function that differs by process, or fails in one, does not make the processes differ."""
    task, sent, first = task_of("seq2seq"), [], ({"own": 3.0}, ["metric own failed"] if is_failure else [])

    def gathered(given: object) -> list[object]:
        sent.append(given)
        return [first, given]

    monkeypatch.setattr(agreement, "gathered", gathered)
    monkeypatch.setattr(type(task), "predict", lambda *given, **options: [{"target": "b"}])
    loaded: Any = SimpleNamespace(processor=lambda texts: {"input_ids": [[1] for _ in texts]})
    for own in (lambda given, right: 1.0, lambda given, right: 1 / 0):
        measure = Measure({"own": own}, [{"source": "a", "target": "b"}])
        assert str(measure) == "own on 1 held-out row"
        if is_failure:
            with pytest.raises(ValueError, match="metric own failed"):
                measure.of(task, loaded, batch_size=1)
        else:
            assert measure.of(task, loaded, batch_size=1) == {"own": 3.0}
    assert sent == [({"own": 1.0}, []), ({}, ["metric own failed: ZeroDivisionError: division by zero"])]


def test_a_function_measures_classes_too(tmp_path: Path) -> None:
    """Law: the lists have the rows' order, so the page's example, the share of right answers, is the accuracy."""
    (example,) = re.findall(r"```python\n(def contains.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "page.py").write_text(example, encoding="utf-8")
    metric = ("--set", f"metric={tmp_path / 'page.py'}:contains", "--allow-code", "--out", tmp_path / "out")
    succeeded(*classifier(tmp_path, "toy-low-rank", "{rank: 2}"), *metric)
    record = record_of(tmp_path / "out")
    assert record["metrics"]["contains"] == pytest.approx(record["metrics"]["accuracy"])
    assert record["metric_rows"] == record["rows"]["eval"]


def test_the_rows_are_drawn_the_same_in_every_run() -> None:
    """A hundred of a language model, unless the recipe says how many; others all."""
    rows = [{"source": "a", "target": str(n)} for n in range(300)]
    assert measure_of([], task_of("seq2seq"), rows, None).of(task_of("seq2seq"), None, batch_size=1) == {}  # type: ignore[arg-type]  # no model is asked
    one, other = (measure_of(["exact_match"], task_of("seq2seq"), rows, most) for most in (None, 100))
    assert isinstance(one, Measure)
    assert len(one.rows) == 100
    assert [*one.rows] == [*other.rows] != rows[:100]
