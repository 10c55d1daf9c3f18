"""The private methods of a transformers Trainer that write and read weights and optimizer states.

Nothing here imports transformers. If a release renames one, tests/test_transformers_private.py names it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any


def replace_(
    trainer: Any,
    *,
    save: Callable[..., None],
    save_states: Callable[..., None],
    load: Callable[..., None],
    load_best: Callable[..., None],
) -> None:
    """Replace methods on the instance; each function is given the trainer's own method first, then its arguments."""
    trainer._save = partial(save, trainer._save)
    trainer._save_optimizer_and_scheduler = partial(save_states, trainer._save_optimizer_and_scheduler)
    trainer._load_from_checkpoint = partial(load, trainer._load_from_checkpoint)
    trainer._load_best_model = partial(load_best, trainer._load_best_model)


def overridden(kind: Any, base: Any) -> list[str]:
    """The names of the methods for weights that ``kind``, a class of trainers, does not share with ``base``."""
    pairs = {
        "_save": (kind._save, base._save),
        "_load_from_checkpoint": (kind._load_from_checkpoint, base._load_from_checkpoint),
        "_load_best_model": (kind._load_best_model, base._load_best_model),
    }
    return [name for name, (own, original) in pairs.items() if own is not original]
