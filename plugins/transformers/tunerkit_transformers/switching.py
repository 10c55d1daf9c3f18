"""Temporarily switch off a Trainer's special cases for FSDP and DeepSpeed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

FSDP, DEEPSPEED = "is_fsdp_enabled", "is_deepspeed_enabled"


@contextmanager
def without(trainer: Trainer, *flags: str) -> Iterator[None]:
    """Inside the block, the trainer writes and reads checkpoints as if it did not run these engines.

    With FSDP, it would write the whole base each time, or nothing with sharded state dicts. With DeepSpeed, it
    would gather the whole base first, or make DeepSpeed write a second checkpoint.

    Args:
        trainer: The trainer.
        flags: `FSDP`, `DEEPSPEED` or both.
    """
    own: Any = trainer
    before = {flag: getattr(own, flag) for flag in flags}
    for flag in flags:
        setattr(own, flag, False)
    try:
        yield
    finally:
        for flag, enabled in before.items():
            setattr(own, flag, enabled)
