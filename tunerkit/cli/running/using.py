"""What the commands do with a trained folder: predict, evaluate, merge and talk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tunerkit
from tunerkit import TunerkitError
from tunerkit.cli.outputs import OutputError
from tunerkit.cli.rows.reading import DataError, Table, read_table
from tunerkit.cli.running.arguments import trainer_arguments
from tunerkit.cli.running.building import build_trainer
from tunerkit.cli.tasks import task_of
from tunerkit.cli.tasks.base import Task
from tunerkit.integrations.output_folder import Run, load_run, read_run
from tunerkit.integrations.pretrained import Pretrained, quiet


def predict_rows(
    folder: Path, asked: Sequence[str] | Path, *, base: str | None, batch_size: int
) -> list[dict[str, Any]]:
    """Predict texts, or the rows of a file; the labels may be missing in it."""
    run, task = _run_in(folder)
    if isinstance(asked, Path):
        rows = task.rows(read_table(asked), _columns(run), predicting=True)
    else:
        rows = task.rows(_table(task, asked), {}, predicting=True)
    return task.predict(_load(run, base), rows, batch_size=batch_size)


def evaluate_rows(folder: Path, data: Path, *, base: str | None, batch_size: int) -> dict[str, Any]:
    """Evaluate on the rows of a file and return the metrics."""
    run, task = _run_in(folder)
    rows = task.rows(read_table(data), _columns(run))
    loaded = _load(run, base)
    kind, _ = task.trainer_classes()
    training = {"per_device_eval_batch_size": batch_size, "save_strategy": "no"}
    encoded = task.encode(rows, loaded)
    trainer = build_trainer(
        kind,
        trainer_arguments(task, training, folder, has_eval=True),
        model=loaded.model,
        train_dataset=encoded,
        eval_dataset=encoded,
        processing_class=loaded.processor,
        **task.trainer_settings(loaded),
    )
    results = task.evaluate(trainer, trainer.eval_dataset, rows, run.labels)
    found: dict[str, Any] = {"rows": len(rows), **results.metrics}
    return found


def write_merged(folder: Path, out: Path, *, base: str | None) -> None:
    """Write the base with the adapter in its weights, and the processor: a folder for ``from_pretrained``.

    Raises:
        OutputError: The new folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out}: is not empty; pass a new folder")
    loaded = _load(read_run(folder), base)
    tunerkit.unwrap(loaded.model, keep_merged=True)
    loaded.model.save_pretrained(out)
    loaded.processor.save_pretrained(out)


def conversation(folder: Path, *, base: str | None, new_tokens: int) -> Callable[[str], str]:
    """Return a function that answers a message; it remembers the conversation if the tokenizer has a chat template.

    Raises:
        TunerkitError: The folder holds no language model.
    """
    from tunerkit.cli.tasks.generating import generate

    run = read_run(folder)
    if run.task not in ("causal-lm", "preference", "seq2seq"):
        raise TunerkitError(
            f"{folder} holds a model for {run.task}, which cannot talk; use `tunerkit predict {folder}`"
        )
    loaded = _load(run, base)
    talked: list[dict[str, str]] = []

    def answer(message: str) -> str:
        if loaded.processor.chat_template is None:
            return generate(loaded, [message], batch_size=1, new_tokens=new_tokens)[0]
        talked.append({"role": "user", "content": message})
        text = generate(loaded, [talked], batch_size=1, new_tokens=new_tokens)[0]
        talked.append({"role": "assistant", "content": text})
        return text

    return answer


def _run_in(folder: Path) -> tuple[Run, Task]:
    run = read_run(folder)
    return run, task_of(run.task, run.record.get("max_length"))


def _load(run: Run, base: str | None) -> Pretrained:
    quiet()
    return load_run(run, base)


def _columns(run: Run) -> dict[str, str]:
    """The names that the columns had in the training data, by ours."""
    return dict(run.record.get("recipe", {}).get("columns", {}))


def _table(task: Task, texts: Sequence[str]) -> Table:
    """Texts from the command line, as rows with the task's first column."""
    inputs = [each for each in task.columns if not each.predicted]
    name = next((each.name for each in inputs if each.name in ("text", "prompt", "source")), None)
    if name is None:
        raise DataError(f"--text is for tasks with texts; {task.name} needs --data with {inputs[0].name!r}")
    if task.name == "causal-lm":
        name = "prompt"
    return Table("--text", (name,), tuple({name: text} for text in texts))
