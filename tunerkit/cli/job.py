"""The main job: load, wrap, train, evaluate, save, and print the results."""

import functools
import time

from rich.console import Console

import tunerkit
from tunerkit import RankChange, Tuner
from tunerkit.cli import assets, outputs
from tunerkit.cli.baseline import compare
from tunerkit.cli.batches import encode
from tunerkit.cli.data import DataError, Examples, class_names, read_examples, split
from tunerkit.cli.models import load_classifier
from tunerkit.cli.results import metrics, write_json, write_pictures
from tunerkit.cli.task import Job, Outcome, Task, fit, refuse_nonfinite, say, score
from tunerkit.cli.training import choose_device
from tunerkit.report.rank_map import rank_map
from tunerkit.report.terminal import rank_table

DEMO_TRAIN_ROWS = 4000
DEMO_HELD_OUT_ROWS = 3000
HELD_OUT_SHARE = 0.2
# The split is fixed: --seed changes the training, never the rows it is evaluated on.
SPLIT_SEED = 0


def run(job: Job, console: Console) -> None:
    """Run the job, print the results, and write the files into ``job.out``."""
    tunerkit.structure(job.method, job.settings)  # report a typo before creating or downloading anything
    outputs.prepare(job.out)
    task = prepare(job, console)
    model = task.classifier.model
    # A new head is untrained, so it is trained in full unless the settings name other modules.
    trained = job.settings.get("train_modules") or list(task.classifier.heads)
    tunerkit.wrap(model, job.method, {**job.settings, "train_modules": trained}, seed=job.recipe.seed)
    tuner = tunerkit.tuner(model)
    outcome = tune(task, job, tuner, console)
    record = metrics(task, job, tuner, outcome)
    with outputs.publishing(job.out) as scratch:
        tunerkit.save(model, scratch)
        write_json(scratch / "metrics.json", record)
        write_pictures(scratch, job.method, tuner, outcome, console)
    console.print(rank_table(rank_map(tuner.ranks()), initial=max(outcome.history[0].ranks.values(), default=None)))
    say(console, f"budget {tuner.budget()}, live triplets {sum(tuner.ranks().values())}")
    say(console, f"{job.method}: accuracy {outcome.score.accuracy:.4f} on {len(task.held_out.ids)} held-out rows")
    if job.baseline:
        record["baseline"] = compare(task, job, tuner, outcome, console)
        with outputs.publishing(job.out) as scratch:
            write_json(scratch / "metrics.json", record)
    say(console, f"written to {job.out}: {', '.join(sorted(file.name for file in job.out.iterdir()))}")


def prepare(job: Job, console: Console) -> Task:
    """Read and split the data, load the model with a head for the classes, and encode the texts."""
    examples, held_out, data = read_data(job, console)
    classes = class_names(examples.labels)
    if len(classes) < 2:
        raise DataError(
            f"{data}: every training row has the label {classes[0]!r}; a classifier needs at least two classes"
        )
    source = job.model or str(assets.demo_model(assets.cache_folder(), functools.partial(say, console)))
    classifier = load_classifier(source, classes, seed=job.recipe.seed)
    device = choose_device()
    classifier.model.to(device)
    encoded = [encode(classifier, part, max_length=job.max_length) for part in (examples, held_out)]
    return Task(classifier, job.model or "all-MiniLM-L6-v2", data, encoded[0], encoded[1], device)


def read_data(job: Job, console: Console) -> tuple[Examples, Examples, str]:
    """Return the training rows, the held-out rows, and the name of their source."""
    columns = {"text_column": job.text_column, "label_column": job.label_column}
    if job.data is None:
        if job.eval_data is not None:
            raise DataError("--eval-data needs --data: the demo has its own held-out sentences")
        sentences = assets.demo_sentences(assets.cache_folder(), functools.partial(say, console))
        examples, rest = split(sentences, train_rows=DEMO_TRAIN_ROWS, seed=SPLIT_SEED)
        return examples, rest.take(range(DEMO_HELD_OUT_ROWS)), "movie sentences"
    examples = read_examples(job.data, **columns)
    if job.eval_data is not None:
        return examples, read_examples(job.eval_data, **columns), str(job.data)
    held_out = round(HELD_OUT_SHARE * len(examples))
    if held_out == 0:
        raise DataError(f"{job.data}: {len(examples)} rows are too few to hold some out; pass others with --eval-data")
    return *split(examples, train_rows=len(examples) - held_out, seed=SPLIT_SEED), str(job.data)


def tune(task: Task, job: Job, tuner: Tuner, console: Console) -> Outcome:
    """Train the wrapped model and evaluate it."""
    model = task.classifier.model
    parameters = tunerkit.trainable_parameters(model)
    say(console, f"{job.method} on {len(tuner.targets)} matrices of {task.source}: {parameters}")
    start = RankChange(step=0, budget=tuner.budget(), ranks=tuner.ranks())
    began = time.perf_counter()
    losses = fit(task, job.recipe, console, title=job.method, tuner=tuner)
    trained = time.perf_counter()
    scored = score(task)
    refuse_nonfinite(scored.loss, f"on the held-out rows after {tuner.steps} steps", job.recipe)
    seconds = {"train": trained - began, "evaluate": time.perf_counter() - trained}
    end = RankChange(step=tuner.steps, budget=tuner.budget(), ranks=tuner.ranks())
    return Outcome(scored, losses, seconds, parameters, (start, *tuner.history, end))
