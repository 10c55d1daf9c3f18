"""Mistakes in a recipe, in files, columns and names: said at once, without torch, transformers or datasets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from tunerkit.errors import TunerkitError
from tunerkit_cli.preparing import checking
from tunerkit_cli.recipes.recipe import Recipe

ROWS = "text,label\ngood film,good\nbad plot,bad\n"
RUN = {"version": 1, "task": "text-classification", "model": {"source": "hub/name"}, "recipe": {}}
# The command's arguments, and words of the line that it answers with. The model is a folder with a config alone.
MISTAKES = {
    "train --model model --data gone.csv": "gone.csv: no such file",
    "train --model model --data rows.csv --data gone.csv": "gone.csv: no such file",
    "train --model model --data rows.csv --eval-data gone.parquet": "gone.parquet: no such file",
    "train --model model --data rows.xlsx": "rows.xlsx: data files end in .csv, .tsv, .json, .jsonl, .parquet",
    "train --model model --data semicolon.csv": "this file seems to separate columns by semicolons",
    "train --model model --data broken.parquet": "broken.parquet: cannot be read as .parquet",
    "train --model model --data model": "model: expected a subfolder per class with images",
    "train --model model --data rows.csv --text-column txt": "needs a column 'txt'; there is only 'text', 'label'",
    "train --model model --data rows.csv --task seq2seq": "seq2seq needs a column 'target'",
    "train --model model --data rows.csv --eval-data other.csv": "other.csv: text-classification needs a column 'text'",
    "train --model model --eval-data other.csv": "eval_data needs data: the demo has its own held-out sentences",
    "train --model model --data other.csv": "which fit no task; say which one it is with --task",
    "train --model model --data points.parquet": "points.parquet: column 'label' has numbers such as 4.5",
    "train columns.yaml --model model --data rows.csv": "columns.txt: the task text-classification has no such column",
    "train --model model --data rows.csv --set chat_template=gone.jinja": "chat_template: gone.jinja cannot be read",
    "train --model model --data rows.csv --set chat_template=model": "chat_template: model is a folder; pass a file",
    "train modle.yaml": "modle.yaml: unknown key 'modle'; did you mean 'model'?",
    "train gone.yaml": "gone.yaml: no such file",
    "train rate.yaml --model model --data rows.csv": "training.learning_rte: TrainingArguments has no argument of this "
    "name; did you mean 'learning_rate'?",
    "train rate.yaml --model model --data texts.jsonl": "training.learning_rte: SFTConfig has no argument of this name",
    "train here.yaml --model model --data rows.csv": "training.output_dir: set the recipe's `out` instead",
    "train --set training.learning_rte=1": "no key 'learning_rte' in 'training'; did you mean 'learning_rate'?",
    "train --set eval_data": "--set 'eval_data': expected key=value",
    "train --model ./gone --data rows.csv": "./gone: no such folder",
    "train --model rows.csv --data rows.csv": "rows.csv is a file; pass the folder that has config.json",
    "train --model model --data films": "films: no such file or folder; for a data set of the hub, write its name",
    "train --task regression": "the task regression needs --data",
    "train --data rows.csv --task regression": "the task regression needs --model",
    "train --data rows.csv --from gone": "--from gone: no such file or folder",
    "train --model model --data rows.csv --out run": "--out run: holds an ended run (run.json); pass --overwrite",
    "train --model model --data rows.csv --out model": "--out model: the folder holds other files, such as config.json",
    **{
        f"train --model model --data {rest}": line
        for rest, line in {
            "rows.csv --set metric=Rouge": "metric: there is none named 'Rouge'; did you mean 'rouge_l'?",
            "rows.csv --set metric=bleu": "named 'bleu'; pass one of exact_match, rouge_l, chrf, or FILE.py:FUNCTION",
            "rows.csv --set metric=chrf": "metric: chrf needs sacrebleu: pip install ",
            "rows.csv --set metric=exact_match": "is for causal-lm and seq2seq, and the task is text-classification",
            "texts.jsonl --set training.metric_for_best_model=rouge_l": "rouge_l is not measured; set metric: rouge_l",
            "rows.csv --set metric=onw.py:one": "metric: onw.py: no such file; did you mean 'own.py'?",
            "rows.csv --set metric=own.py:one": "own.py:one is code; read it, and pass --allow-code to run it",
            "rows.csv --set metric=own.py:on --allow-code": "own.py has no function 'on'; did you mean 'one'?",
            "rows.csv --set metric=rows.csv:one --allow-code": "metric: rows.csv cannot be run: SyntaxError: invalid",
            "rows.csv --set training.report_to=[tensorboard]": "training.report_to: tensorboard needs tensorboard: pip",
        }.items()
    },
    "train --out begun --resume": "begun/own.py:one is code; read it, and pass --allow-code to run it",
    "train --out nowhere --resume": "--out nowhere: there is no run to resume in this folder",
    "predict gone --text good": "gone: no such folder",
    "predict run --data gone.csv": "gone.csv: no such file",
    "predict run --data other.csv": "needs a column 'text'; there is only 'a', 'b' (name the columns as in",
    "eval run --data other.csv": "needs a column 'text'",
    "chat model": "model is the folder of a model, not of a run",
    # It needs datasets, and is the last one therefore.
    "train --model model --data acme/films": "no such data set in the cache; HF_HUB_OFFLINE or HF_DATASETS_OFF",
}
# Runs the commands in a process that has no torch, and prints the exit code and the line of each as JSON.
_ANSWERS = """
import json, shlex, sys
sys.modules["torch"] = None
sys.modules |= dict.fromkeys(("rouge_score", "sacrebleu", "tensorboard", "tensorboardX"))
from typer.testing import CliRunner
from tunerkit_cli.app import build
for line in sys.stdin:
    done = CliRunner().invoke(build(), shlex.split(line))
    loaded = [name for name in ("transformers", "datasets", "trl", "peft") if name in sys.modules]
    print(json.dumps([done.exit_code, done.stderr, loaded]))
"""


def write_files(folder: Path) -> None:
    """The files that the commands name."""
    from pyarrow import parquet, table

    texts = {
        "rows.csv": ROWS,
        "rows.xlsx": "PK",
        "semicolon.csv": ROWS.replace(",", ";"),
        "other.csv": "a,b\n1,2\n",
        "broken.parquet": "PAR1",
        "texts.jsonl": '{"text": "a good film"}\n',
        "columns.yaml": "columns: {txt: sentence}\n",
        "modle.yaml": "modle: x\n",
        "rate.yaml": "training: {learning_rte: 1e-3}\n",
        "here.yaml": "training: {output_dir: here}\n",
        "own.py": "def one(predictions, references):\n    return 1\n",
        "begun/own.py": "",
        "begun/recipe.yaml": "metric: ./own.py:one\n",
        "begun/written.json": json.dumps({"tunerkit": "0.1.0", "files": ["recipe.yaml", "written.json"]}),
        "model/config.json": "{}",
        "run/run.json": json.dumps({**RUN, "labels": ["bad", "good"]}),
        "run/written.json": json.dumps({"tunerkit": "0.1.0", "files": ["run.json", "written.json"]}),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    parquet.write_table(table({"text": ["a", "b"], "label": [4.5, 1.5]}), folder / "points.parquet")


def answered(folder: Path, script: str, *commands: str) -> list[Any]:
    """What a process in the folder prints for each command, from JSON."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="".join(f"{each}\n" for each in commands),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_mistake_in_recipe_files_or_names_is_said_without_torch(tmp_path: Path) -> None:
    """Law: each is one line with exit code 2 in a process that has no torch, and no other slow library is imported."""
    write_files(tmp_path)
    for command, (code, line, loaded) in zip(MISTAKES, answered(tmp_path, _ANSWERS, *MISTAKES), strict=True):
        assert MISTAKES[command] in line, (command, line)
        needed = ["datasets"] if "acme/" in command else []
        assert (code, line.count("\n"), loaded) == (2, 1, needed), (command, line)
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_or_setting_is_said_without_transformers(tmp_path: Path) -> None:
    """They need torch, since a method's plugin does."""
    write_files(tmp_path)
    given = "train --model model --data rows.csv"
    expected = {
        f"{given} --method lroa": "no method named 'lroa'",
        f"{given} --set lerning_rate=1": "there is no key 'lerning_rate'; did you mean 'learning_rate'",
        f"{given} --set method=lora --config '{{rnk: 2}}'": "rnk",
    }
    script = _ANSWERS.replace('sys.modules["torch"] = None\n', "")
    for words, (code, line, loaded) in zip(expected.values(), answered(tmp_path, script, *expected), strict=True):
        assert words in line
        assert (code, line.count("\n"), loaded) == (2, 1, []), line


@pytest.mark.parametrize(
    ("first", "last", "recipe"),
    [
        ({"prompt": "x", "completion": "y", "label": True}, {"label": 2}, Recipe()),
        ({"text": "x"}, {"label": "a"}, Recipe(task="text-classification", drop_bad_rows=True)),
    ],
)
def test_the_first_rows_refuse_nothing_that_later_rows_may_settle(
    first: dict[str, Any], last: dict[str, Any], recipe: Recipe, tmp_path: Path
) -> None:
    """A whole file of such rows is refused."""
    data, rows = tmp_path / "rows.jsonl", [first] * 100
    recipe = attrs.evolve(recipe, data=str(data), model=str(tmp_path), out=str(tmp_path / "out"))
    (tmp_path / "config.json").write_text("{}")
    data.write_text("\n".join(map(json.dumps, [*rows, {**first, **last}])))
    checking.check(recipe, resume=False, overwrite=False)
    data.write_text("\n".join(map(json.dumps, rows[1:])))
    with pytest.raises(TunerkitError, match=r"--task kto|needs a column 'label'"):
        checking.check(recipe, resume=False, overwrite=False)


def test_lora_is_the_default_and_the_demo_is_adaloras(tmp_path: Path) -> None:
    """What names no method and has data is trained with LoRA; the demo shows ranks. A run keeps the method it has."""
    pytest.importorskip("tunerkit_lora", reason="needs the method lora")
    pytest.importorskip("tunerkit_adalora", reason="needs the method adalora")
    recipe = Recipe(data="rows.csv", out=str(tmp_path))
    assert checking.completed(recipe, resume=False).method == "lora"
    assert checking.completed(Recipe(out=str(tmp_path)), resume=False).method == "adalora"
    assert checking.completed(Recipe(method="LoRA"), resume=False).method == "lora"
    for kept, method in (("", "adalora"), ("method: lora\n", "lora"), ("method: ia3\n", "ia3")):
        (tmp_path / "recipe.yaml").write_text(f"data: rows.csv\n{kept}")
        assert checking.completed(recipe, resume=True).method == method
