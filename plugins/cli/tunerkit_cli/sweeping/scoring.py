"""The score of each held-out row after a training: whether its class is right, or its loss."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from tunerkit.errors import ConfigError
from tunerkit_cli.machine import hardware
from tunerkit_cli.preparing.fitting import build_fitted
from tunerkit_cli.preparing.session import Session
from tunerkit_cli.sweeping.statistics import Scores
from tunerkit_cli.tasks.base import Row, Task
from tunerkit_cli.tasks.texts import short_to_long
from tunerkit_transformers.learned_positions import is_scored, score_learned_

# What changes the loss itself, so that the losses of two values say nothing of which one is better.
_OF_LOSS: Final = (
    *("model", "max_length", "chat_template", "train_on_prompts", "class_weights", "loss"),
    *("beta", "loss_type", "label_smoothing", "label_smoothing_factor", "desirable_weight", "undesirable_weight"),
    *("center_rewards_coefficient", "truncation_mode", "assistant_only_loss", "completion_only_loss", "packing"),
)


def refuse_unlike(task: Task, keys: Iterable[str]) -> None:
    """Raise `ConfigError` if runs of a task cannot be compared by the score of their rows, where these keys differ."""
    if task.name == "embedding":
        raise ConfigError(
            [
                "embedding: its loss is one of batches, and a sweep scores rows one by one; run `tunerkit train` for "
                "each value, and compare the runs with `tunerkit report`"
            ]
        )
    if task.name == "grpo":
        raise ConfigError(
            [
                "grpo: the rewards of sampled answers are not those of the same answers in each run; run `tunerkit "
                "train` for each value, and compare the runs with `tunerkit report`"
            ]
        )
    unlike = [key for key in keys if key.rpartition(".")[2] in _OF_LOSS]
    if unlike and not task.one_class:
        raise ConfigError(
            [f"{unlike[0]}: changes the loss of {task.name} itself, by which runs are compared; give it one value"]
        )


def metric_of(task: Task) -> str:
    """Return the name of the score: ``accuracy`` where a row has one class, else ``loss``."""
    return "accuracy" if task.one_class else "loss"


def row_scores(session: Session, rows: Sequence[Row], right: Sequence[bool] | None = None) -> Scores:
    """Score rows with the model as it is; where the score is a loss, one at a time.

    Args:
        session: A run that has been trained.
        rows: Rows under our names of the columns.
        right: What an evaluation of these rows said of each, as the trainer takes them; None if it has to be found.

    Returns:
        (rows,): 1 or 0 for a right or a wrong class; for other tasks minus the loss, so that more is better. Rows that
        leave a language model nothing to learn have no score; they are the same after each training with one model.
    """
    task, loaded = session.task, session.loaded
    if task.one_class:
        return _right_or_wrong(session, task.encode(rows, loaded), right)
    arguments = copy.copy(session.trainer.args)
    arguments.per_device_eval_batch_size, arguments.train_sampling_strategy = 1, "sequential"
    part = ("the held-out rows", task.encode(rows, loaded))
    trainer, _ = build_fitted(task, arguments, loaded, {"train": part, "eval": part})
    if is_scored(session.trainer) and not is_scored(trainer):
        score_learned_(trainer)
    model: Any = trainer.model.eval()
    found: list[float] = []
    with hardware.computing_in(session.precision, loaded.model.device):
        for batch in trainer.get_eval_dataloader():
            found.append(-float(trainer.prediction_step(model, batch, prediction_loss_only=True)[0]))
    return np.array(found)


def _right_or_wrong(session: Session, encoded: Any, right: Sequence[bool] | None) -> Scores:
    order = short_to_long(encoded) if "input_ids" in encoded.column_names else [*range(len(encoded))]
    if right is None:
        right = session.task.evaluate(session.trainer, encoded.select(order)).right
    scores = np.empty(len(order))
    scores[order] = right
    return scores
