"""What the commands do with a trained folder: predict, evaluate and talk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tunerkit import TunerkitError
from tunerkit.errors import FileError, shown
from tunerkit_cli.machine import hardware
from tunerkit_cli.preparing.data import Rows, read_rows
from tunerkit_cli.preparing.fitting import build_fitted, cut_at_positions_
from tunerkit_cli.preparing.trainer import trainer_arguments
from tunerkit_cli.recipes.recipe import PRECISIONS
from tunerkit_cli.rows import DataError, Table, read_table
from tunerkit_cli.tasks import task_of
from tunerkit_cli.tasks.base import Row, Task, require_text
from tunerkit_cli.tasks.generating import GREEDY, Answering, generate, require_system
from tunerkit_cli.tasks.language import GenerationTask, settle_prompts_
from tunerkit_cli.tasks.metrics import Measure, measure_of, refuse_unusable
from tunerkit_cli.tasks.texts import token_limit
from tunerkit_cli.telling import say
from tunerkit_transformers.learned_positions import obstacle, score_learned_
from tunerkit_transformers.output_folder import RECORD, Run, load_run, read_run
from tunerkit_transformers.pretrained import Pretrained, quiet

# What only concerns a run that trains: the other arguments, such as DPO's beta, decide what its loss is.
_OF_TRAINING = (
    *("save_", "logging_", "log_", "hub_", "push_to_hub", "report_to", "run_name", "project", "trackio_"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("eval_do_concat_batches", "prediction_loss_only", "label_names"),  # with them, no metric can be computed
)
_OF_GPUS = ("tf32",)  # which no CPU has; a run on a GPU may be evaluated on a CPU
_HALF = ("bf16", "fp16")


def predict_rows(
    folder: Path,
    asked: Sequence[str] | Sequence[Path],
    *,
    base: str | None,
    batch_size: int,
    answering: Answering = GREEDY,
    columns: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Predict texts, or the rows of files, without their labels; ``columns`` are names in these files, by ours."""
    run, task = _run_in(folder)
    if answering.given and not isinstance(task, GenerationTask):
        raise TunerkitError(f"{answering.given[0]}: {run.task} generates no text; leave it out")
    files = [each for each in asked if isinstance(each, Path)]
    if answering.system is not None and files:
        raise TunerkitError("--system: is for --text; the rows of --data have messages of their own")
    if answering.system is not None:
        _require_conversations(run, _conversed(run, default=False))
    if files:
        tables, names = [read_table(path, predicting=True) for path in files], _names(run, columns)
    else:
        tables, names = [_table(run, task, [str(each) for each in asked], answering.system)], {}
    read = _read(task, tables, names, predicting=True)
    rows = _as_trained(run, read)
    places = [{**({"file": each.source} if len(files) > 1 else {}), "row": each.number} for each in read.placed]
    loaded, precision = _load(run, base)
    with hardware.computing_in(precision, loaded.model.device):
        if isinstance(task, GenerationTask):
            if answering.system is not None:
                require_system(loaded, answering.system)
            answering.seed_draws()
            return task.predict(loaded, rows, batch_size=batch_size, answering=answering)
        answers = task.predict(loaded, rows, batch_size=batch_size)
    return [{**place, **answer} for place, answer in zip(places, answers, strict=True)]


def evaluate_rows(
    folder: Path,
    data: Sequence[Path],
    *,
    base: str | None,
    batch_size: int | None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The metrics on rows of files, by the run's loss, in batches as it was evaluated: some losses depend on them."""
    run, task = _run_in(folder)
    recipe = run.record.get("recipe", {})
    options: Any = {"drop": recipe.get("drop_bad_rows", False), "label_map": recipe.get("label_map", {})}
    read = _read(task, [read_table(path) for path in data], _names(run, columns), **options)
    rows = _as_trained(run, read)
    measure = Measure()
    for name in (each for each in recipe.get("metric") or () if ":" not in each):  # no code runs here
        try:
            refuse_unusable([name])
            one = measure_of([name], task, rows, recipe.get("metric_rows"))
            measure = Measure({**measure.functions, **one.functions}, one.rows)
        except TunerkitError as problem:
            say(Console(stderr=True), f"note: {name} is not measured: {problem}")
    loaded, precision = _load(run, base)
    left_out = (*_OF_TRAINING, *_HALF, *(_OF_GPUS if loaded.model.device.type == "cpu" else ()))
    trained = recipe.get("training", {})
    training = {
        name: value for name, value in trained.items() if name not in task.defaults and not name.startswith(left_out)
    }
    size = batch_size or trained.get("per_device_eval_batch_size", 32)
    training |= {"per_device_eval_batch_size": size, "save_strategy": "no"}
    arguments = trainer_arguments(task, training, folder, precision=precision, has_eval=True)
    settle_prompts_(task, rows[0], recipe.get("train_on_prompts"), training, arguments, earlier=True)
    cut_at_positions_(arguments, loaded)
    part = (read.source, task.encode(rows, loaded))
    trainer, fits = build_fitted(task, arguments, loaded, {"train": part, "eval": part})
    if recipe.get("loss") == "learned" and obstacle(trainer) is None:
        score_learned_(trainer)
    fit = fits.get("eval")
    found: dict[str, Any] = {"rows": len(rows) - (fit.missing if fit is not None else 0)}
    if fit is not None and fit.missing:
        found["left_out"] = dict(fit.left_out)
    # Where TRL has prepared a reference, the trainer does not put autocast around the model itself.
    with hardware.computing_in(precision, loaded.model.device):
        found |= {"metric_rows": len(measure.rows)} if measure.functions else {}
        found |= task.evaluate(trainer, trainer.eval_dataset).metrics
        return {**found, **measure.of(task, loaded, batch_size=size)}


def conversation(folder: Path, *, base: str | None, answering: Answering) -> Callable[[str], None]:
    """Return a function that prints the answer to a message, and remembers the conversation if it learned such."""
    from transformers import TextStreamer

    run, task = _run_in(folder)
    if not isinstance(task, GenerationTask):
        raise TunerkitError(
            f"{folder} holds a model for {run.task}, which cannot talk; use `tunerkit predict {folder}`"
        )
    loaded, precision = _load(run, base)
    remembers = _conversed(run, default=loaded.processor.chat_template is not None)
    limit = token_limit(loaded, task.limit)
    if answering.system is not None:
        _require_conversations(run, remembers)
        require_system(loaded, answering.system)
    talked = _system(answering.system)
    answering.seed_draws()

    def answer(message: str) -> None:
        talked.append({"role": "user", "content": message})
        prompt = talked if remembers else message
        streamer = TextStreamer(loaded.processor, skip_prompt=True, skip_special_tokens=True)
        with hardware.computing_in(precision, loaded.model.device):
            answers = generate(loaded, [prompt], batch_size=1, answering=answering, max_length=limit, streamer=streamer)
        talked.append({"role": "assistant", "content": answers[0]})

    return answer


def _run_in(folder: Path) -> tuple[Run, Task]:
    run = read_run(folder)
    return run, task_of(run.task, run.record.get("max_length"))


def _load(run: Run, base: str | None) -> tuple[Pretrained, str]:
    """Load a run's model onto the accelerator, if there is one, and say what it computes in: the run's, if possible."""
    quiet()
    loaded = load_run(run, base)
    loaded.model.to(hardware.choose_device())
    trained = run.record.get("recipe", {}).get("training", {})
    asked = next((name for name in _HALF if trained.get(name) is True), None)
    precision = str(run.record.get("precision") or asked or "fp32")
    if precision not in PRECISIONS:
        allowed = " or ".join((", ".join(PRECISIONS[:-1]), PRECISIONS[-1]))
        raise FileError(f"{run.folder / RECORD}: precision: expected {allowed}, got {shown(precision)}")
    problem = hardware.obstacle(loaded.model.device, precision)
    if problem is None:
        return loaded, precision
    say(Console(stderr=True), f"note: {run.folder} was trained in {precision}, and {problem}; it is used in fp32")
    return loaded, "fp32"


def _conversed(run: Run, *, default: bool) -> bool:
    """Whether a language model was trained on conversations; the default if an earlier version wrote the record."""
    return bool(run.record.get("conversations", default))


def _require_conversations(run: Run, conversed: bool) -> None:
    """Raise `TunerkitError` if a system's message has no place, as in a model for texts."""
    if not conversed:
        raise TunerkitError(f"--system: {run.folder} was not trained on conversations; write it into your text")


def _system(text: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [] if text is None else [{"role": "system", "content": text}]


def _names(run: Run, columns: Mapping[str, str] | None) -> dict[str, str]:
    """The names of the columns in the training data, by ours, with others in their place."""
    return {**run.record.get("recipe", {}).get("columns", {}), **(columns or {})}


def _read(task: Task, tables: Sequence[Table], names: Mapping[str, str], **options: Any) -> Rows:
    """Check rows, and print what is odd about them on stderr. The options are those of `read_rows`."""
    read = read_rows(task, tables, names, renaming=False, **options)
    for note in read.notes:
        say(Console(stderr=True), f"note: {note}")
    return read


def _as_trained(run: Run, read: Rows) -> list[Row]:
    """Refuse single texts where pairs were trained, and leave second texts out where single ones were."""
    rows = read.rows
    trained = "text_pair" in run.record.get("columns", ())
    if "columns" not in run.record or not rows or trained == ("text_pair" in rows[0]):
        return rows
    if trained:
        raise DataError(
            f"{read.source}: has no second texts, and pairs of texts were trained; pass --data with both columns, "
            "named as in the training data"
        )
    return [{name: value for name, value in row.items() if name != "text_pair"} for row in rows]


def _table(run: Run, task: Task, texts: Sequence[str], system: str | None) -> Table:
    """Texts from the command line, as rows with the task's first column: in words of a user, if those were trained."""
    inputs = [each for each in task.columns if not each.predicted]
    name = next((each.name for each in inputs if each.name in ("text", "prompt", "source", "anchor")), None)
    if name is None:
        raise DataError(f"--text is for tasks with texts; {task.name} needs --data with {inputs[0].name!r}")
    values: Sequence[object] = texts
    if name == "prompt" and _conversed(run, default=False):
        for text in texts:
            require_text({"text": text}, "text")
        values = [[*_system(system), {"role": "user", "content": text}] for text in texts]
    return Table("--text", (name,), tuple({name: value} for value in values))
