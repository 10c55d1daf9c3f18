"""Rows as people have them: forms of other programs, rows of trainings that no task does, and rows that do not fit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_classifier import save_tiny_classifier
from tests.support.train_command import command, record_of, succeeded
from tunerkit_cli.preparing.data import read_rows
from tunerkit_cli.rows import BadRowsError, Table
from tunerkit_cli.running.record import without_home
from tunerkit_cli.tasks import TaskError, task_of
from tunerkit_cli.tasks.formats import FORMS, infer, standard
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

Rows = list[dict[str, Any]]
ASKED, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "x"), ("assistant", "y"), ("assistant", "z"))
)
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"title": "x"}}}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


def table(*rows: dict[str, Any]) -> Table:
    return Table("data", tuple(dict.fromkeys(name for row in rows for name in row)), rows)


def read(row: dict[str, Any], task: str | None = None, **names: str) -> Rows:
    """The one row of a file, by the task that it is for."""
    return read_rows(task_of(task or infer(table(row), names)), [table(row)], names).rows


@pytest.mark.parametrize(
    ("row", "ours"),
    [
        ({"instruction": "x", "input": "i", "output": "y"}, {"prompt": "x\ni", "completion": "y"}),
        ({"instruction": "x", "input": "", "output": "y"}, {"prompt": "x", "completion": "y"}),
        ({"instruction": "x", "input": None, "output": "y"}, {"prompt": "x", "completion": "y"}),
        (
            {"instruction": "x", "context": "i", "response": "y", "category": "open_qa"},
            {"prompt": "x\ni", "completion": "y"},
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "id": 3},
            {"messages": [ASKED, GOOD]},
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "system": "s"},
            {"messages": [SYSTEM, ASKED, GOOD]},
        ),
        ({"messages": [SYSTEM, ASKED, GOOD], "system": "other"}, {"messages": [SYSTEM, ASKED, GOOD]}),
        (
            {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
            {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        ),
        (
            {"prompt": "x", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
            {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        ),
        (
            {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
            {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        ),
        ({"messages": [{**ASKED, "content": [{"type": "text", "text": "x"}]}, GOOD]}, {"messages": [ASKED, GOOD]}),
        ({"instruction": "x", "input": "i", "output": "y", "text": "t"}, {"prompt": "x\ni", "completion": "y"}),
        (
            {"prompt": "p", "completion": "y", "question": "x", "context": "i"},
            {"prompt": "p", "completion": "y"},
        ),
        (
            {"prompt": "p", "chosen": "y", "rejected": "z", "question": "x", "context": "i"},
            {"prompt": "p", "chosen": "y", "rejected": "z"},
        ),
        (
            {"source": "s", "target": "y", "instruction": "x", "input": "i"},
            {"source": "s", "target": "y"},
        ),
        ({"text": "x", "label": "a", "images": 3}, {"text": "x", "label": "a"}),
        ({"text": "x", "label": "a", "audio": "x.wav"}, {"text": "x", "label": "a"}),
        ({"prompt": "x", "completion": "y", "images": []}, {"prompt": "x", "completion": "y"}),
    ],
)
def test_rows_in_forms_of_other_programs_become_ours(row: dict[str, Any], ours: dict[str, Any]) -> None:
    """The task follows from them too."""
    assert read(row) == [ours]


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("tool_calls", [CALL]),
        ("tool_calls", [{"function": {"name": "search", "arguments": '{"title": "x"}'}}]),
        ("tool_calls", [{"name": "search", "arguments": {"title": "x"}}]),
        ("function_call", '{"name": "search", "arguments": {"title": "x"}}'),
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tool_calls_have_one_form_and_tools_are_in_the_first_message(name: str, calls: Any, tools: Any) -> None:
    """As OpenAI's, flat, or in ShareGPT's roles, with arguments as JSON or as a mapping, and no content."""
    said: Rows = [
        {"from": "human", "value": "x"},
        {"from": name, "value": calls},
        {"from": "observation", "value": "r"},
    ]
    if name == "tool_calls":
        said = [
            ASKED,
            {"role": "assistant", "content": None, name: calls},
            {"role": "tool", "content": "r", "name": "t"},
        ]
    (row,) = read({"conversations" if name == "function_call" else "messages": [*said, GOOD], "tools": tools})
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    answer = {key: value for key, value in said[2].items() if key == "name"}
    assert row == {"messages": [{**ASKED, "tools": [TOOL]}, called, {"role": "tool", "content": "r", **answer}, GOOD]}


def test_what_a_recipe_names_is_read_as_it_is() -> None:
    """No form takes a column that the recipe names, or makes one of that name; renamed columns of a form count."""
    row = {"instruction": "x", "input": "i", "output": "y"}
    assert read(row, prompt="instruction") == [{"prompt": "x", "completion": "y"}]
    assert read(row, "causal-lm", text="input") == [{"text": "i"}]
    renamed = {"good": [ASKED, GOOD], "bad": [ASKED, BAD]}
    wanted = [{"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}]
    assert read(renamed, chosen="good", rejected="bad") == wanted
    assert standard(table(row), {}, "text-classification") == table(row)
    assert len({form.columns for form in FORMS}) == len(FORMS)


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"prompt": "x", "completion": "y", "label": True}, None, "'label' of true or false are unpaired .*--task kto"),
        ({"q": "x", "completion": "y", "label": False}, None, "unpaired preferences: pass --task kto"),
        ({"messages": [ASKED, GOOD], "kto_tag": False}, None, "'kto_tag' of true or false"),
        ({"prompt": "x", "answer": "y"}, None, "no completions.*--task grpo.*--task causal-lm if it is 'answer'"),
        (
            {"prompt": [ASKED], "solution": "y"},
            None,
            "'prompt' has no answers to learn, and 'solution' to check.*grpo with",
        ),
        (
            {"prompt": "x", "ground_truth": "y", "text": "t", "label": "a"},
            None,
            "no answers to learn.*--task grpo with",
        ),
        ({"problem": "x", "solution": "y"}, None, "columns.prompt=problem --set columns.completion=solution"),
        ({"messages": [ASKED], "solution": "y"}, None, "'messages' has no answers to learn.*columns.prompt=messages"),
        ({"image": "x.png", "text": "y"}, None, "has images in 'image' beside the text in 'text', which no task reads"),
        ({"messages": [ASKED, GOOD], "images": ["x.png"]}, "causal-lm", "has images in 'images' beside .*'messages'"),
        (
            {"photo": [{"bytes": b"x", "path": None}], "text": "y"},
            None,
            "has images or sound in 'photo' beside the text",
        ),
        ({"audio": {"bytes": b""}, "label": "a"}, None, "has sound in 'audio', which no task"),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z", "messages": [ASKED]},
            None,
            "fit preference and causal-lm; say",
        ),
        ({"text": "x", "label": "a", "source": "y", "target": "z"}, None, "fit seq2seq and text-classification; say"),
        ({"question": "x", "answer": "y", "document": "z", "summary": "w"}, None, "fit causal-lm and seq2seq"),
    ],
)
def test_rows_of_other_trainings_or_of_two_tasks_are_named(row: dict[str, Any], task: str | None, message: str) -> None:
    """They would be trained for what they are not for, in silence."""
    names = {"prompt": "q"} if "q" in row else {}
    with pytest.raises(TaskError, match=message):
        read(row, task, **names)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("label", [True, None, False]),
        ("label", ["true", "", "false"]),
        ("label", ["1.0", "0.0"]),
        ("label", ["Good", "bad"]),
        ("kto_tag", [1, 0]),
        ("is_good", [True, False]),
    ],
)
def test_answers_that_are_judged_are_named_whatever_the_words(name: str, values: list[object]) -> None:
    """With rows without a judgement too; another column of truth values is named with what makes it the label."""
    rows = table(*({"prompt": "x", "completion": "y", name: value} for value in values))
    with pytest.raises(TaskError, match=f"a '{name}' of true or false are unpaired.*--task kto"):
        infer(rows, {})
    other = table(*({"prompt": "x", "completion": "y", name: value} for value in ("en", "de")))
    assert infer(other, {}) == "causal-lm"
    if name == "is_good":
        assert [row["label"] for row in read_rows(task_of("kto"), [rows], {"label": name}).rows] == values


def test_a_named_task_or_column_settles_what_could_be_two() -> None:
    """But for rows that the task would learn wrongly."""
    assert read({"prompt": "x", "answer": "y"}, "causal-lm") == [{"prompt": "x", "completion": "y"}]
    assert read({"prompt": "x", "answer": "y"}, completion="answer") == [{"prompt": "x", "completion": "y"}]
    solved = {"problem": "x", "solution": "y"}
    assert read(solved, "causal-lm", prompt="problem", completion="solution") == [{"prompt": "x", "completion": "y"}]
    assert read({"messages": [ASKED, GOOD], "solution": "y"}) == [{"messages": [ASKED, GOOD]}]
    both = {"text": "x", "label": "a", "image": "x.png", "source": "y", "target": "z"}
    assert read(both, "text-classification") == [{"text": "x", "label": "a"}]
    assert read(both, "seq2seq") == [{"source": "y", "target": "z"}]
    assert infer(table({**both, "image": None}), {"source": "source"}) == "seq2seq"
    assert infer(table({"image": "x.png", "label": "a", "question": "x"}), {}) == "image-classification"
    joined = {"question": "x", "context": "i", "source": "s", "target": "y"}
    assert read(joined, "seq2seq") == [{"source": "s", "target": "y"}]
    unpaired = table({"prompt": "x", "completion": "y", "label": 1}, {"prompt": "x", "completion": "z", "label": 0})
    found = read_rows(task_of("causal-lm"), [unpaired], {})
    assert found.notes == ["data: 'label' is not read, so good and bad answers are learned alike"]
    judged = read_rows(task_of("kto"), [unpaired], {})
    assert [row["label"] for row in judged.rows] == [True, False]
    assert judged.notes == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": None}, GOOD]}, "a message has a role and a content, got"),
        (
            {"messages": [{"role": "narrator", "content": "x"}, GOOD]},
            "expected a role of system, user, assistant, tool",
        ),
        ({"messages": [{**ASKED, "content": [{"type": "image"}]}, GOOD]}, "has images or sound beside text"),
        ({"messages": [ASKED, {**GOOD, "tool_calls": [{"name": 3}]}]}, "expected tool calls such as"),
        ({"messages": [ASKED, {**GOOD, "tool_calls": "{"}]}, "expected tool calls such as"),
        ({"messages": [ASKED, GOOD], "tools": "{"}, r"column 'messages \+ tools': expected tools as a list of JSON"),
        (
            {"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]},
            "column 'chosen . rejected': chosen and rejected do not",
        ),
        ({"instruction": None, "input": "i", "output": "y"}, r"column 'instruction \+ input': expected texts"),
    ],
)
def test_a_value_that_has_no_reading_is_named_with_the_columns_of_the_file(row: dict[str, Any], message: str) -> None:
    """Whatever our own column is called."""
    for task in (None, "seq2seq") if "instruction" in row else (None,):
        with pytest.raises(BadRowsError, match=message):
            read(row, task)


def mixed() -> Table:
    """Rows of which four do not fit, in three ways."""
    rows = [{"review": f"text {n}", "stars": "good" if n % 2 else "bad"} for n in range(10)]
    for place, (name, value) in {1: ("stars", " "), 4: ("review", 3), 6: ("stars", ""), 8: ("stars", None)}.items():
        rows[place][name] = value  # type: ignore[assignment]
    return table(*rows)


def test_all_rows_that_do_not_fit_are_one_message_by_kind() -> None:
    """With their numbers, under the file's names of the columns, and what leaves them out."""
    names = {"text": "review", "label": "stars"}
    with pytest.raises(BadRowsError) as caught:
        read_rows(task_of("text-classification"), [mixed()], names)
    assert str(caught.value) == (
        "data: rows 2, 7, column 'stars': the label is empty; fill it in, or remove the row; "
        "and row 5, column 'review': expected text, got 3; "
        "and row 9, column 'stars': has no value; fill it in, or remove the row "
        "(4 of 10 rows; drop_bad_rows: true in a recipe leaves them out)"
    )
    many = table(*[{"text": n, "label": "a"} for n in range(1000)])
    with pytest.raises(BadRowsError, match=r"^data: rows 1, 2, 3 and 997 more, column 'text': expected text, got 0$"):
        read_rows(task_of("text-classification"), [many], {}, drop=True)


def test_rows_that_do_not_fit_are_left_out_if_asked() -> None:
    """They are counted and listed, and the others keep their numbers; a row of another kind counts too."""
    names = {"text": "review", "label": "stars"}
    found = read_rows(task_of("text-classification"), [mixed()], names, drop=True)
    assert [each.number for each in found.placed] == [1, 3, 4, 6, 8, 10]
    assert [each["row"] for each in found.left_out] == [2, 5, 7, 9]
    assert found.left_out[0] == {
        "file": "data",
        "row": 2,
        "column": "stars",
        "problem": "the label is empty; fill it in, or remove the row",
    }
    assert found.notes[0].startswith("left out 4 rows: data: rows 2, 7, column 'stars'")
    rows: list[dict[str, Any]] = [
        {"prompt": "x", "completion": "y"},
        {"prompt": 3, "completion": "y"},
        {"prompt": [ASKED], "completion": [GOOD]},
    ]
    found = read_rows(task_of("causal-lm"), [table(*rows)], {}, drop=True)
    assert [each["row"] for each in found.left_out] == [2, 3]
    assert found.rows == rows[:1]


def test_rows_of_the_rarer_kind_are_the_bad_ones() -> None:
    """Whichever comes first; and a value that is no list of messages among those of implicit prompts."""
    texts = [{"prompt": "x", "completion": "y"}] * 3
    found = read_rows(task_of("causal-lm"), [table({"prompt": [ASKED], "completion": [GOOD]}, *texts)], {}, drop=True)
    assert (found.rows, [each["row"] for each in found.left_out]) == (texts, [1])
    good: dict[str, Any] = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    rows: list[dict[str, Any]] = [good, {**good, "chosen": None}, {**good, "rejected": 3}, {"rejected": [ASKED, BAD]}]
    found = read_rows(task_of("preference"), [table(*rows)], {}, drop=True)
    assert [each["row"] for each in found.left_out] == [2, 3, 4]


def test_a_list_of_left_out_rows_has_no_path_of_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row may hold one itself, such as an image's."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    text = json.dumps({"problem": f"'/home/me{os.sep}pics/bad.png' cannot be read, nor /mnt/home/me{os.sep}x"})
    assert without_home(text) == text.replace(json.dumps(f"'/home/me{os.sep}")[1:-1], "'~/")


@pytest.mark.parametrize(
    ("task", "row", "wanted"),
    [
        ("text-classification", {"text": "x", "label": 1}, "sport"),
        ("multi-label", {"text": "x", "label": ["1", "2"]}, ["sport", "2"]),
        ("token-classification", {"tokens": ["x", "y"], "tags": ["1", "1"]}, ["sport", "sport"]),
    ],
)
def test_labels_get_the_names_of_a_map(task: str, row: dict[str, Any], wanted: object) -> None:
    """Those that it does not name stay."""
    found = read_rows(task_of(task), [table(row)], {}, label_map={"1": "sport"})
    assert found.rows[0][task_of(task).label_column] == wanted
    assert "1" in found.classes


def test_a_run_keeps_what_it_leaves_out_and_how_labels_and_columns_are_named(tmp_path: Path) -> None:
    """The folder lists the rows, without the path of a home; ``eval`` and ``predict`` take other columns."""
    save_tiny_classifier(tmp_path / "bert")
    rows = [*["good film,1", "bad plot,0"] * 10, " ,1", "the film,"]
    (tmp_path / "data.csv").write_text("\n".join(["review,stars", *rows]))
    (tmp_path / "other.csv").write_text("body,mark\ngood film,1\nbad plot,0\nfilm,\n")
    names = ["--text-column", "review", "--label-column", "stars", "--set", "label_map={'0': bad, '1': good}"]
    with registered(LowRankPlugin()):
        arguments = ["train", "--model", tmp_path / "bert", "--data", tmp_path / "data.csv", "--method", "toy-low-rank"]
        arguments += ["--epochs", "1", "--out", tmp_path / "out", *names]
        assert "rows; drop_bad_rows: true" in command(*arguments, "--dry-run").stderr
        done = succeeded(*arguments, "--set", "drop_bad_rows=true")
        assert (
            f"note: left out 2 rows: {tmp_path / 'data.csv'}: row 21, column 'review': the text is empty" in done.output
        )
        listed = [json.loads(line) for line in (tmp_path / "out" / "left-out.jsonl").read_text().splitlines()]
        assert [(each["row"], each["column"]) for each in listed] == [(21, "review"), (22, "stars")]
        assert listed[0]["file"] == record_of(tmp_path / "out")["recipe"]["data"]
        record = record_of(tmp_path / "out")
        assert (record["bad_rows"], record["labels"]) == (2, ["bad", "good"])
        renamed = ["--data", tmp_path / "other.csv", "--column", "text=body", "--column", "label=mark"]
        assert json.loads(succeeded("eval", tmp_path / "out", *renamed).stdout)["rows"] == 2
        assert len(succeeded("predict", tmp_path / "out", *renamed[:4]).stdout.splitlines()) == 3
        assert "pass --column text=YOURS" in command("predict", tmp_path / "out", *renamed[:2]).stderr
