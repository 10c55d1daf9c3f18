"""What the commands do with a trained folder: predict, evaluate, merge and talk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tunerkit
from tunerkit import TunerkitError
from tunerkit.cli.converting.merging import merge_adapter
from tunerkit.cli.outputs import OutputError, new_folder
from tunerkit.cli.rows.reading import DataError, Table, read_table
from tunerkit.cli.running.arguments import choose_device, trainer_arguments
from tunerkit.cli.running.building import build_trainer
from tunerkit.cli.tasks import task_of
from tunerkit.cli.tasks.base import Row, Task, require_text
from tunerkit.cli.tasks.generating import GenerationTask, generate
from tunerkit.cli.tasks.texts import token_limit
from tunerkit.integrations.adapter_files import has_no_record
from tunerkit.integrations.output_folder import Run, load_run, read_run
from tunerkit.integrations.pretrained import Pretrained, quiet

# What only concerns a run that trains: the other arguments, such as DPO's beta, decide what its loss is.
_OF_TRAINING = (
    *("save_", "logging_", "log_", "hub_", "push_to_hub", "report_to", "run_name", "project", "trackio_"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("eval_do_concat_batches", "prediction_loss_only", "label_names"),  # with them, no metric can be computed
)
_OF_GPUS = ("fp16", "tf32")  # which no CPU has; a run on a GPU may be evaluated on a CPU


def predict_rows(
    folder: Path,
    asked: Sequence[str] | Path,
    *,
    base: str | None,
    batch_size: int,
    new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Predict texts, or the rows of a file, without its labels.

    Raises:
        TunerkitError: The rows do not fit, or ``new_tokens`` was given and the task generates nothing.
    """
    run, task = _run_in(folder)
    if new_tokens is not None and not isinstance(task, GenerationTask):
        raise TunerkitError(f"--new-tokens: {run.task} generates no text; leave it out")
    if isinstance(asked, Path):
        rows = _rows(run, task, asked, predicting=True)
    else:
        rows = task.rows(_table(run, task, asked), {}, predicting=True)
        _as_trained(run, rows, "--text")
    loaded = _load(run, base)
    if new_tokens is not None and isinstance(task, GenerationTask):
        return task.predict(loaded, rows, batch_size=batch_size, new_tokens=new_tokens)
    return task.predict(loaded, rows, batch_size=batch_size)


def evaluate_rows(folder: Path, data: Path, *, base: str | None, batch_size: int) -> dict[str, Any]:
    """Evaluate on the rows of a file, by the loss of the run, and return the metrics."""
    run, task = _run_in(folder)
    rows = _rows(run, task, data)
    loaded = _load(run, base)
    kind, _ = task.trainer_classes()
    trained = run.record.get("recipe", {}).get("training", {})
    left_out = (*_OF_TRAINING, *(_OF_GPUS if choose_device().type == "cpu" else ()))
    training = {name: value for name, value in trained.items() if not name.startswith(left_out)}
    training |= {"per_device_eval_batch_size": batch_size, "save_strategy": "no"}
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
    found: dict[str, Any] = {"rows": len(rows), **task.evaluate(trainer, trainer.eval_dataset).metrics}
    return found


def write_merged(source: str, out: Path, *, base: str | None, task: str | None = None) -> tuple[str, ...]:
    """Write the base with the adapter in its weights, and the processor: a folder for ``from_pretrained``.

    Args:
        source: The output folder of a run, whose record says all; or an adapter in any format.
        out: A new folder.
        base: Where the base model is; None for what the adapter's files say.
        task: The task of an adapter whose files do not say it.

    Returns:
        What the user should know.

    Raises:
        OutputError: The new folder is not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out}: is not empty; pass a new folder")
    if has_no_record(source):
        return merge_adapter(source, out, base=base, task=task)
    run = read_run(source)
    if task not in (None, run.task):
        raise TunerkitError(f"--task {task}: {source} was trained for {run.task}, as its record says; leave --task out")
    with new_folder(out) as scratch:
        quiet()
        loaded = load_run(run, base)  # not on the accelerator, which may have no room for the merged weights
        # Quantising the sums again would round them, and the folder would need the library.
        dense = None if run.quantisation is None else loaded.model.dtype
        tunerkit.unwrap(loaded.model, keep_merged=True, dtype=dense)
        loaded.model.save_pretrained(scratch)
        loaded.processor.save_pretrained(scratch)
    return ()


def conversation(folder: Path, *, base: str | None, new_tokens: int) -> Callable[[str], None]:
    """Return a function that prints the answer to a message, word by word.

    It remembers the conversation if the model was trained on conversations.

    Raises:
        TunerkitError: The folder holds no language model.
    """
    from transformers import TextStreamer

    run, task = _run_in(folder)
    if not isinstance(task, GenerationTask):
        raise TunerkitError(
            f"{folder} holds a model for {run.task}, which cannot talk; use `tunerkit predict {folder}`"
        )
    loaded = _load(run, base)
    remembers = _conversed(run, default=loaded.processor.chat_template is not None)
    limit = token_limit(loaded, task.limit)
    talked: list[dict[str, str]] = []

    def said(prompt: str | list[dict[str, str]]) -> str:
        streamer = TextStreamer(loaded.processor, skip_prompt=True, skip_special_tokens=True)
        return generate(loaded, [prompt], batch_size=1, new_tokens=new_tokens, max_length=limit, streamer=streamer)[0]

    def answer(message: str) -> None:
        if not remembers:
            said(message)
            return
        talked.append({"role": "user", "content": message})
        talked.append({"role": "assistant", "content": said(talked)})

    return answer


def _run_in(folder: Path) -> tuple[Run, Task]:
    run = read_run(folder)
    return run, task_of(run.task, run.record.get("max_length"))


def _load(run: Run, base: str | None) -> Pretrained:
    """Load a run's model onto the accelerator, if there is one."""
    quiet()
    loaded = load_run(run, base)
    loaded.model.to(choose_device())
    return loaded


def _conversed(run: Run, *, default: bool) -> bool:
    """Whether a language model was trained on conversations; the default if an earlier version wrote the record."""
    return bool(run.record.get("conversations", default))


def _rows(run: Run, task: Task, data: Path, *, predicting: bool = False) -> list[Row]:
    """Read rows whose columns are named as in the training data."""
    names = dict(run.record.get("recipe", {}).get("columns", {}))
    return _as_trained(run, task.rows(read_table(data), names, predicting=predicting, renaming=False), str(data))


def _as_trained(run: Run, rows: list[Row], source: str) -> list[Row]:
    """Refuse single texts where pairs were trained, and leave second texts out where single ones were."""
    trained = "text_pair" in run.record.get("columns", ())
    if "columns" not in run.record or not rows or trained == ("text_pair" in rows[0]):
        return rows
    if trained:
        raise DataError(
            f"{source}: has no second texts, and pairs of texts were trained; pass --data with both columns, named as "
            "in the training data"
        )
    return [{name: value for name, value in row.items() if name != "text_pair"} for row in rows]


def _table(run: Run, task: Task, texts: Sequence[str]) -> Table:
    """Texts from the command line, as rows with the task's first column: in words of a user, if those were trained."""
    inputs = [each for each in task.columns if not each.predicted]
    name = next((each.name for each in inputs if each.name in ("text", "prompt", "source")), None)
    if name is None:
        raise DataError(f"--text is for tasks with texts; {task.name} needs --data with {inputs[0].name!r}")
    values: Sequence[object] = texts
    if name == "prompt" and _conversed(run, default=False):
        for text in texts:
            require_text({"text": text}, "text", "--text")
        values = [[{"role": "user", "content": text}] for text in texts]
    return Table("--text", (name,), tuple({name: value} for value in values))
