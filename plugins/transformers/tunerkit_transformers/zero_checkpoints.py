"""Checkpoints of a Trainer that runs DeepSpeed: beside the adapters, DeepSpeed's own files, without the frozen base."""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

_LATEST = "latest"  # names the folder, global_step and a number


def runs_deepspeed(trainer: Trainer) -> bool:
    """Whether DeepSpeed trains the trainer's model, even inside `without`, which clears the Trainer's own flag."""
    return getattr(trainer.accelerator.state, "deepspeed_plugin", None) is not None


@contextmanager
def without_base(trainer: Trainer) -> Iterator[None]:
    """Inside the block, DeepSpeed writes no frozen parameters; the Trainer requests this only for peft's adapters."""
    if not runs_deepspeed(trainer):
        yield
        return
    engine: Any = trainer.model_wrapped
    engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
    try:
        yield
    finally:
        del engine.save_checkpoint


@contextmanager
def base_may_be_missing(model: nn.Module) -> Iterator[None]:
    """Inside the block, ``model.load_state_dict`` accepts a state without the frozen parameters: see `without_base`."""
    handle = model.register_load_state_dict_post_hook(_forgive)
    try:
        yield
    finally:
        handle.remove()


def _forgive(model: nn.Module, keys: Any) -> None:
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


def trainer_files(trainer: Trainer) -> list[str]:
    """Return the names of the Trainer's own files. DeepSpeed's contain the scheduler if its config names one."""
    return [] if "scheduler" in trainer.accelerator.state.deepspeed_plugin.deepspeed_config else [SCHEDULER_NAME]


def parts(trainer: Trainer, checkpoint: Path) -> tuple[list[str], list[Path]]:
    """Return the problems of DeepSpeed's files, as sentence fragments about the checkpoint; and this rank's files.

    Args:
        trainer: The trainer that is about to resume.
        checkpoint: The folder of the Trainer's checkpoint.
    """
    latest = checkpoint / _LATEST
    if not latest.is_file():
        return [
            "has no files of DeepSpeed's (save_only_model, or trained without it), and a Trainer that runs DeepSpeed "
            "cannot resume without them"
        ], []
    folder = checkpoint / latest.read_text().strip()
    found = {path: _rank(path) for path in sorted(folder.glob("*_states.pt"))}
    of = trainer.args.world_size
    ranks = {rank for path, rank in found.items() if path.name.endswith("optim_states.pt")}
    own = [path for path, rank in found.items() if rank in (None, trainer.args.process_index)]
    problems = []
    if any(rank is not None and rank >= of for rank in ranks):
        problems.append(
            f"was written by another number of processes than {of}, and DeepSpeed cannot redistribute its shards"
        )
    for kind, what in (("model_states.pt", "the model"), ("optim_states.pt", "the optimizer")):
        if not any(path.name.endswith(kind) for path in own):
            problems.append(f"has no part of {what} for process {trainer.args.process_index} in {folder.name}")
    return problems, own


def _rank(path: Path) -> int | None:
    """The rank that wrote one of DeepSpeed's files; None for a common file."""
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return None if match is None else int(match[1])
