"""What ``tunerkit train`` prints of a run: before training, and after it."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

import tunerkit
from tunerkit.cli.demo import demo_of
from tunerkit.cli.recipes.recipe import Recipe
from tunerkit.cli.running.record import Trained
from tunerkit.cli.running.session import Session
from tunerkit.cli.running.telling import say
from tunerkit.cli.tasks.texts import token_limit
from tunerkit.paths import few
from tunerkit.report.record import Problem, Restart
from tunerkit.report.verdict import failure


def describe(session: Session, console: Console) -> None:
    """Print what is about to be trained: data, columns, lengths, steps and parameters."""
    data, arguments, train_set = session.data, session.trainer.args, session.trainer.train_dataset
    say(
        console, f"{session.task.name}: {len(data.train)} training rows of {data.source}, {len(data.held_out)} held out"
    )
    used = ", ".join(name if name == ours else f"{ours} ({name})" for ours, name in data.columns.items())
    say(console, f"columns: {used}{f'; left out: {few(data.unused, shown=10)}' if data.unused else ''}")
    if "input_ids" in (train_set.column_names or ()):
        _describe_lengths(session, sorted(len(row) for row in train_set["input_ids"]), console)
    if data.labels:
        say(console, f"{len(data.labels)} classes: {', '.join(data.labels[:10])}{' …' * (len(data.labels) > 10)}")
    *_, steps = session.trainer.set_initial_training_values(arguments, session.trainer.get_train_dataloader())
    say(console, f"{steps} steps, {arguments.num_train_epochs:g} epochs, batches of {arguments.train_batch_size}")
    if session.start is not None:
        say(console, f"goes on from {session.start.source}")
    parameters = tunerkit.trainable_parameters(session.loaded.model)
    say(console, f"{session.tuner.method} on {len(session.tuner.targets)} matrices: {parameters}")


def _describe_lengths(session: Session, lengths: Sequence[int], console: Console) -> None:
    """Print how long the texts are, which are sorted by length, and how many of them are as long as they may be."""
    limit = vars(session.trainer.args).get("max_length", token_limit(session.loaded, session.task.limit))
    cut = "not cut"
    if limit is not None:
        reaching = len(lengths) - bisect_left(lengths, limit)
        cut = f"cut at {limit} tokens, which {reaching} {'row reaches' if reaching == 1 else 'rows reach'}"
    say(console, f"lengths: {lengths[len(lengths) // 2]} tokens in the middle, {lengths[-1]} at most ({cut})")


def tell(session: Session, trained: Trained, console: Console) -> None:
    """Print the ranks and the metrics."""
    from tunerkit.report.rank_map import rank_map
    from tunerkit.report.terminal import rank_table

    tuner = session.tuner
    if (ranks := tuner.ranks()) and tuner.needs_steps:
        highest = max(trained.start.ranks.values(), default=None)
        console.print(rank_table(rank_map(ranks), initial=highest))
        say(console, f"budget {tuner.budget()}, live triplets {sum(ranks.values())}")
    if trained.metrics:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in trained.metrics.items())
        say(console, f"{tuner.method}: {shown} on {len(session.data.held_out)} held-out rows")


def conclude(recipe: Recipe, record: Mapping[str, Any], console: Console) -> None:
    """Print what a good result of the demo is, and what is wrong with the run."""
    if recipe.data is None and (good := demo_of(record["task"], "data").good) is not None:
        say(console, f"a good result of this demo is {good}")
    for restart in record.get("restarts", ()):
        say(console, f"this run was {Restart(**restart)}")
    if sentence := failure([Problem(**problem) for problem in record.get("problems", ())]):
        say(console, sentence)
