"""Avoid unneeded work in a Trainer's defaults: recomputed activations, padding and unused logits."""

from collections.abc import Collection
from functools import partial
from typing import Any

import attrs
import torch

from tunerkit.plugin.trainers import inside
from tunerkit_transformers import first_token, transformers_private
from tunerkit_transformers.agreement import gathered
from tunerkit_transformers.free_memory import GIB, fits, free_bytes
from tunerkit_transformers.grouping import GroupedByLength, lengths_in, padding
from tunerkit_transformers.learned_positions import obstacle, score_learned_
from tunerkit_transformers.memory_plan import CHECKPOINTING, Plan, plan_of, writes_tokens
from tunerkit_transformers.out_of_memory import note_memory_


@attrs.frozen
class Saving:
    """One choice of `speed_up`.

    Attributes:
        name: The setting: ``"gradient checkpointing"``, ``"batches"`` or ``"loss"``.
        chosen: The setting's value now.
        changed: Whether `speed_up` changed the value.
        why: The reason for the value.
    """

    name: str
    chosen: str
    changed: bool
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.chosen} ({self.why})"


def speed_up(trainer: Any, *, keep: Collection[str] = (), memory: float | None = None) -> tuple[Saving, ...]:
    """Remove unneeded work from a Trainer's steps.

    The loss and its gradients stay the same, but for the draws of dropout.

    - Activations are recomputed only if they would not fit into memory (estimated).
    - Batches contain rows of similar length, in a random order that is the same after resuming.
    - On a CPU, TRL's `SFTTrainer` and `DPOTrainer` compute logits only at positions with a label.
    - Classifiers of BERT's kind compute their last layer, behind its attention, only for the token that they read.
    - An out-of-memory error gets a note with the parts of the plan and the settings that save memory.

    Call it before each ``trainer.train()``, also one that resumes from a checkpoint.

    Args:
        trainer: A transformers Trainer, such as TRL's.
        keep: Settings to leave unchanged: ``"gradient_checkpointing"``, ``"train_sampling_strategy"`` or ``"loss"``.
        memory: The most bytes that the process may use, including the model; by default all free memory.

    Returns:
        The choices, with their reasons.
    """
    lengths, most = lengths_in(trainer.train_dataset), getattr(trainer.args, "max_length", None)
    if lengths and most is not None:  # to which TRL cuts pairs as it makes a batch
        lengths = [min(length, most) for length in lengths]
    loss = _loss_(trainer, keep="loss" in keep)  # on which the memory of logits depends
    checkpointing, planned = _checkpointing_(trainer, lengths, memory, keep=not {*CHECKPOINTING}.isdisjoint(keep))
    note_memory_(trainer, planned)
    return checkpointing, _batches_(trainer, lengths, keep="train_sampling_strategy" in keep), loss


def _checkpointing_(
    trainer: Any, lengths: list[int] | None, memory: float | None, *, keep: bool
) -> tuple[Saving, Plan | None]:
    """Turn gradient checkpointing on if a step would not fit into memory without it, else off; return the plan too."""
    arguments, name = trainer.args, "gradient checkpointing"
    names = [each for each in CHECKPOINTING if hasattr(arguments, each)]
    were = {each: getattr(arguments, each) for each in names}
    before = any(were.values())
    if keep or not lengths or not writes_tokens(trainer.model):
        why = "as asked" if keep else "the rows' lengths are not known" if not lengths else "not a language model"
        return Saving(name, "on" if before else "off", False, why), plan_of(trainer)
    planned = None
    try:
        for each in names:
            setattr(arguments, each, False)
        planned = plan_of(trainer)
    finally:
        if planned is None:
            for each, was in were.items():
                setattr(arguments, each, was)
    free = free_bytes(arguments.device, memory)
    # The processes of a training decide alike.
    needs = any(gathered(planned is not None and not fits(planned.step, free)))
    if planned is None:
        return Saving(name, "on" if before else "off", False, "a step cannot be estimated"), None
    known = "an unknown amount is" if free is None else f"{max(free, 0) / GIB:.2f} GiB are"
    why = f"a step takes about {planned.step / GIB:.2f} GiB beside the model, and {known} free"
    now = needs and bool(getattr(trainer.model, "supports_gradient_checkpointing", False))
    if needs and not now:
        why += f"; {type(trainer.model).__name__} cannot recompute its activations"
    if now:
        for each in names:
            setattr(arguments, each, True)
            if getattr(arguments, f"{each}_kwargs") is None:
                setattr(arguments, f"{each}_kwargs", {"use_reentrant": False})
        planned = plan_of(trainer)
    return Saving(name, "on" if now else "off", now != before, why), planned


def _batches_(trainer: Any, lengths: list[int] | None, *, keep: bool) -> Saving:
    """Group rows by length, if the trainer would draw them at random."""
    arguments, name = trainer.args, "batches"
    strategy = arguments.train_sampling_strategy
    unpadded = any(vars(arguments).get(each) for each in ("packing", "padding_free"))
    if keep or lengths is None or strategy != "random" or unpadded:
        why = "as asked" if keep or strategy != "random" else "no padding" if unpadded else "unknown lengths"
        return Saving(name, strategy, False, why)
    size = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    grouped = GroupedByLength(lengths, size, seed)
    transformers_private.sample_by_(trainer, partial(_rows, lengths, size, seed))
    random = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    now, then = (padding(lengths, rows, arguments.train_batch_size) for rows in ([*grouped], random))
    why = f"{now:.2f} tokens are computed for each real one, and {then:.2f} in a random order"
    return Saving(name, "grouped by length, shuffled", True, why)


def _rows(lengths: list[int], size: int, seed: int, dataset: object = None) -> GroupedByLength:
    """Return a new sampler; the Trainer calls this whenever it trains."""
    return GroupedByLength(lengths, size, seed)


def _loss_(trainer: Any, *, keep: bool) -> Saving:
    """Compute logits only at positions with a label, or from the first token alone, if the loss needs no other."""
    is_classifier = type(inside(trainer.model)).__name__.endswith("ForSequenceClassification")
    reason = "as asked" if keep else first_token.obstacle(trainer) if is_classifier else obstacle(trainer)
    if is_classifier and reason is None:
        first_token.read_first_(trainer)
        return Saving("loss", "from the first token", True, "the classifier reads no other token of its last layer")
    if reason is not None:
        return Saving("loss", "the trainer's own", False, reason)
    score_learned_(trainer)
    return Saving("loss", "at the learned positions", True, "on a CPU, TRL's own computes logits at every position")
