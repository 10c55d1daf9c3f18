"""What ``tunerkit train`` prints of a run: before training, and after it."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

import tunerkit
from tunerkit import injection
from tunerkit.errors import shown
from tunerkit.paths import few
from tunerkit_cli.assets import demo_of
from tunerkit_cli.preparing.fitting import NO_ROOM, Fit
from tunerkit_cli.preparing.session import Session
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.report import wording
from tunerkit_cli.report.record import Problem, Restart
from tunerkit_cli.report.verdict import failure
from tunerkit_cli.running.record import Trained, stacks_of
from tunerkit_cli.tasks.texts import positions_of, token_limit
from tunerkit_cli.telling import say


def described(session: Session) -> Iterator[str]:
    """Yield lines on what is about to be trained: data, columns, lengths, steps and parameters."""
    data, arguments, train_set = session.data, session.trainer.args, session.trainer.train_dataset
    yield f"{session.task.name}: {len(data.train)} training rows of {data.source}, {len(data.held_out)} held out"
    used = ", ".join(name if name == ours else f"{ours} ({name})" for ours, name in data.columns.items())
    kept = "read by the reward" if session.task.keeps_columns else "left out"
    yield f"columns: {used}{f'; {kept}: {few(data.unused, shown=10)}' if data.unused else ''}"
    for part, fit in session.fits.items():
        yield from _described_fit(session, part, fit)
    if not session.fits and "input_ids" in (train_set.column_names or ()):
        yield _described_lengths(session, sorted(len(row) for row in train_set["input_ids"]))
    if data.labels:
        yield f"{len(data.labels)} classes: {', '.join(data.labels[:10])}{' …' * (len(data.labels) > 10)}"
    if session.task.trains_on_prompts:
        yield "trains on whole rows, prompts included (train_on_prompts)"
    elif session.task.trains_on_prompts is not None:
        what = "assistant's turns" if "messages" in data.train[0] else "completions"
        yield f"trains on the {what} only; --set train_on_prompts=true is for the prompts too"
    if (joint := _glued(data.train)) is not None:
        yield f"prompts and answers are joined as they are, as in {shown(joint)}; a space between belongs into the rows"
    _, of_an_epoch, *_, steps = session.trainer.set_initial_training_values(
        arguments, session.trainer.get_train_dataloader()
    )
    capped = arguments.max_steps > 0
    epochs = f"{float(f'{steps / of_an_epoch:.3g}') if capped else arguments.num_train_epochs:g}"
    each = f" in each of {arguments.world_size} processes" if arguments.world_size > 1 else ""
    how = f"{steps} step{'' if steps == 1 else 's'}{' (max_steps)' if capped else ''}"
    yield f"{how}, {epochs} epoch{'' if epochs == '1' else 's'}, batches of {arguments.train_batch_size}{each}"
    for saving in session.savings:
        yield str(saving)
    if session.recipe.samples is not None:  # it is a language model's
        yield from _described_end(session)
    if session.watching.spaces:
        yield "checkpoints: at each tenth of the training, at most one a minute, and at the end (--set save_steps=N)"
    if session.measure.functions:
        yield f"metric: {session.measure}"
    precision, device = session.precision, arguments.device.type
    other = "" if precision == "fp32" or device == "cpu" else "; --precision fp32 is slower and rounds less"
    yield f"precision: {precision} on {device}{other}"
    if session.plan is not None:
        yield f"memory: {session.plan.parts()}"
    if session.start is not None:
        yield f"goes on from {session.start.source}"
    parameters = tunerkit.trainable_parameters(session.loaded.model)
    stacks = stacks_of(session.tuner)
    places = f"{len(session.tuner.targets) - len(stacks)} matrices{' and ' * bool(stacks)}{wording.stacks(stacks)}"
    yield f"{session.tuner.method} on {places}: {parameters}"


def _glued(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Where the texts of a prompt and its answer meet, in the first row that has no white space there."""
    for row in rows:
        prompt, answer = row.get("prompt"), row.get("completion", row.get("chosen"))
        if isinstance(prompt, str) and isinstance(answer, str) and not (prompt[-1].isspace() or answer[0].isspace()):
            return f"{prompt[-20:]}{answer[:20]}"
    return None


def _described_end(session: Session) -> Iterator[str]:
    """What a language model does beside its steps: evaluations and answers."""
    strategy, held_out = session.trainer.args.eval_strategy, session.data.held_out
    when = "at the end" if strategy == "no" else f"by eval_strategy, which is {strategy.value}"
    rows = session.rows("eval") if held_out else 0
    share = rows / (rows + session.rows("train"))
    yield f"evaluation: {f'{when}, on {rows} held-out rows, {share:.0%} of all' if rows else 'none'}"
    count = min(session.recipe.samples or 0, len(held_out))
    yield f"samples: {f'{count} short answers after the training' if count else 'none'} (--set samples=N)"


def _described_fit(session: Session, part: str, fit: Fit) -> Iterator[str]:
    """How long a language model's rows are, how many are cut, and how many leave nothing to learn."""
    if part == "train" and fit.lengths:
        lengths = f"lengths: {fit.lengths[len(fit.lengths) // 2]} tokens in the middle, {fit.lengths[-1]} at most"
        longer = f"{fit.longer} {'row is' if fit.longer == 1 else 'rows are'} longer"
        yield f"{lengths} ({'not cut' if fit.limit is None else f'cut at {fit.limit} tokens; {longer}'})"
    if fit.missing:
        named = {"train": "training rows", "eval": "held-out rows"}[part]
        why = ", ".join(f"{count}: {reason}" for reason, count in fit.left_out.items())
        advice = f"; {fit.advice(positions_of(session.loaded))}" if NO_ROOM in fit.left_out else ""
        of = f"{fit.missing} of {len(session.data.parts[part])} {named}"
        yield f"left out: {of}, which leave nothing to learn ({why}){advice}"


def _described_lengths(session: Session, lengths: Sequence[int]) -> str:
    """How long the texts are, which are sorted by length, and how many of them are as long as they may be."""
    limit = vars(session.trainer.args).get("max_length", token_limit(session.loaded, session.task.limit))
    cut = "not cut"
    if "window" in session.trainer.train_dataset.column_names:
        cut = f"in {len(lengths)} windows of up to {limit} tokens, which lose no word"
    elif limit is not None:
        reaching = len(lengths) - bisect_left(lengths, limit)
        cut = f"cut at {limit} tokens, which {reaching} {'row reaches' if reaching == 1 else 'rows reach'}"
    return f"lengths: {lengths[len(lengths) // 2]} tokens in the middle, {lengths[-1]} at most ({cut})"


def tell(session: Session, trained: Trained, console: Console) -> None:
    """Print the ranks and the metrics."""
    tuner = session.tuner
    if (ranks := tuner.ranks()) and injection.needs_steps(tuner):
        say(console, f"budget {tuner.budget()}, live triplets {sum(ranks.values())}")
    if trained.metrics:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in trained.metrics.items())
        fewer = f" ({session.measure})" if 0 < len(session.measure.rows) < session.rows("eval") else ""
        say(console, f"{tuner.method}: {shown} on {session.rows('eval')} held-out rows{fewer}")


def conclude(recipe: Recipe, record: Mapping[str, Any], console: Console) -> None:
    """Print what a good result of the demo is, and what is wrong with the run."""
    if recipe.data is None and (good := demo_of(record["task"], "data").good):
        say(console, f"a good result of this demo is {good}")
    for restart in record.get("restarts", ()):
        say(console, f"this run was {Restart(**restart)}")
    if sentence := failure([Problem(**problem) for problem in record.get("problems", ())]):
        say(console, sentence)
