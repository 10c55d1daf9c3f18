"""How the rows of a language model fit its greatest length: what is cut, and which rows leave nothing to learn."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from tunerkit.errors import ConfigError
from tunerkit_cli.preparing.trainer import build_trainer
from tunerkit_cli.rows import DataError
from tunerkit_cli.tasks.base import NOT_LEARNED, Task
from tunerkit_cli.tasks.generating import prompt_length, refusing_template
from tunerkit_cli.tasks.language import CausalLm, GenerationTask
from tunerkit_cli.tasks.texts import positions_of
from tunerkit_transformers.pretrained import Pretrained

NO_ROOM = "the prompt fills max_length"
NO_TURN = "no assistant's turn"
# Logits of a row that has read another differ by more than half of their norm (SmolLM2-135M); rounding, by a hundredth.
_MIXED = 0.1


@attrs.frozen
class Fit:
    """How the rows of a part fit the greatest length."""

    limit: int | None  # tokens; None if rows are not cut
    lengths: Sequence[int] = ()  # in tokens before the cut, short to long; empty if they are not known
    longer: int = 0  # how many rows are cut
    left_out: Mapping[str, int] = attrs.field(factory=dict)  # how many rows leave nothing to learn, by reason
    needed: int = 0  # the least limit with which no prompt fills it

    @property
    def missing(self) -> int:
        """How many rows leave nothing to learn."""
        return sum(self.left_out.values())

    def advice(self, positions: int | None) -> str:
        """What to do about prompts that are too long, for a model with so many positions."""
        if positions is not None and self.needed > positions:
            return f"the model has positions for {positions}: shorten the prompts"
        whole = self.lengths[-1] if self.lengths else 0
        fits = whole > self.needed and (positions is None or whole <= positions)
        return f"train with --max-length {self.needed} or more{f' ({whole} for the longest row)' if fits else ''}"


def cut_at_positions_(arguments: Any, loaded: Pretrained) -> str:
    """Cut a language model's rows where its positions end, in place; return what to tell of it, which may be empty."""
    positions, limit = positions_of(loaded), vars(arguments).get("max_length", 0)
    if positions is None or (limit is not None and limit <= positions):
        return ""
    arguments.max_length = positions
    said = "max_length is null" if limit is None else f"max_length is {limit}"
    return f"{said}, and the model has positions for {positions} tokens: rows are cut there"


def build_fitted(
    task: Task,
    arguments: Any,
    loaded: Pretrained,
    parts: Mapping[str, tuple[str, Any]],
    callbacks: Sequence[Any] = (),
) -> tuple[Any, Mapping[str, Fit]]:
    """Build the trainer of a task on ``parts`` (source, encoded rows or None), and cut the rows of language models."""
    kind, _ = task.trainer_classes()
    settings = {f"{part}_dataset": rows for part, (_, rows) in parts.items()} | task.trainer_settings(loaded)
    settings |= {"model": loaded.model, "processing_class": loaded.processor, "callbacks": callbacks}
    if isinstance(task, GenerationTask) and task.keeps_order and arguments.per_device_train_batch_size < 2:
        why = f"{task.name} compares each answer with that of the row before it"
        raise ConfigError([f"training.per_device_train_batch_size: expected at least 2, got 1, because {why}"])
    packing = vars(arguments).get("packing")
    if packing and arguments.packing_strategy != "wrapped":  # which cuts and joins texts as they come
        _refuse_mixing(loaded)
    if not isinstance(task, GenerationTask) or task.name == "seq2seq" or packing:
        return build_trainer(kind, arguments, **settings), {}
    (limit, room), is_plain = task.room(arguments, loaded), isinstance(task, CausalLm)
    if not task.drops_long_prompts and limit is not None:
        most = limit - room
        settings |= {f"{part}_dataset": _with_room(rows, most, loaded) for part, (_, rows) in parts.items() if rows}
    if is_plain:
        arguments.max_length = None  # the trainer does not say what it cut, and fails later if nothing is left
    with refusing_template(loaded, "a conversation"):
        trainer = build_trainer(kind, arguments, **settings)
    if is_plain:
        arguments.max_length = trainer.args.max_length = limit
    fits = {}
    for part, (source, encoded) in parts.items():
        name = f"{part}_dataset"
        if encoded is None:
            continue
        if is_plain:
            rows, fit = _fitted(getattr(trainer, name), limit, arguments.truncation_mode)
            setattr(trainer, name, rows)
        else:
            fit = _fit_of_pairs(encoded, getattr(trainer, name), limit, loaded, room)
        if not len(getattr(trainer, name)):
            if NO_ROOM not in fit.left_out:
                raise DataError(
                    f"{source}: no conversation has a turn of the assistant, so there is nothing to learn; add its "
                    "answers"
                )
            raise DataError(
                f"{source}: no row has anything to learn: each prompt fills the {fit.limit} tokens at which rows are "
                f"cut (max_length), and the longest prompt has {fit.needed - 1}; {fit.advice(positions_of(loaded))}"
            )
        fits[part] = fit
    return trainer, fits


@torch.no_grad()
def _refuse_mixing(loaded: Pretrained) -> None:
    """Raise `ConfigError` if rows that are packed into one read each other: then their logits are not those alone."""
    model: Any = loaded.model
    rows = torch.arange(8, device=model.device).reshape(2, 4) % model.get_input_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        positions = torch.arange(4).repeat(1, 2).to(rows)
        packed = model(input_ids=rows.reshape(1, -1), position_ids=positions, use_cache=False).logits[:, 4:].float()
        alone = model(input_ids=rows[1:], use_cache=False).logits.float()
        is_apart = float((packed - alone).norm()) < _MIXED * float(alone.norm())
    except TypeError:  # it takes no positions
        is_apart = False
    finally:
        model.train(was_training)
    if not is_apart:
        raise ConfigError(
            [
                f"training.packing: the attention of {type(model).__name__} reads across the rows that are packed "
                "together; leave packing out, since rows of one length share a batch anyway, or set "
                "attn_implementation: flash_attention_2"
            ]
        )


def _fitted(rows: Any, limit: int | None, mode: str) -> tuple[Any, Fit]:
    """Cut tokenized rows, and leave out those of which no token is learned."""
    ends = [0] * len(rows)  # for each row, the least limit with which something of it is learned
    lengths = []
    for number, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        lengths.append(len(ids))
        if mode == "keep_end":
            labels = labels[::-1]
        ends[number] = next((n for n, label in enumerate(labels, start=1) if label != NOT_LEARNED), 0)
    kept = [number for number, end in enumerate(ends) if end and (limit is None or end <= limit)]
    counts = {NO_ROOM: sum(map(bool, ends)) - len(kept), NO_TURN: ends.count(0)}
    longer = 0 if limit is None else sum(length > limit for length in lengths)
    fit = Fit(limit, sorted(lengths), longer, {why: count for why, count in counts.items() if count}, max(ends))
    rows = rows.select(kept) if len(kept) < len(rows) else rows
    if longer:
        part = slice(limit) if mode == "keep_start" else slice(-limit, None)  # type: ignore[operator]  # if longer
        rows = rows.map(lambda row: {name: row[name][part] for name in ("input_ids", "labels")})
    return rows, fit


def _fit_of_pairs(rows: Any, kept: Any, limit: int | None, loaded: Pretrained, room: int) -> Fit:
    """How answers fit, of which those are left out whose prompt leaves less than so much room."""
    missing = len(rows) - len(kept)
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in kept.column_names]
    if not missing and answers:
        columns = (kept[name] for name in ("prompt_ids", *answers))
        lengths = sorted(len(prompt) + max(map(len, each)) for prompt, *each in zip(*columns, strict=True))
        return Fit(limit, lengths, 0 if limit is None else sum(length > limit for length in lengths))
    needed = max(prompt_length(loaded, row["prompt"]) for row in rows) + room
    return Fit(limit, left_out={NO_ROOM: missing} if missing else {}, needed=needed)


def _with_room(rows: Any, most: int, loaded: Pretrained) -> Any:
    """The rows whose prompt has at most so many tokens."""
    kept = [number for number, row in enumerate(rows) if prompt_length(loaded, row["prompt"]) <= most]
    return rows.select(kept)
