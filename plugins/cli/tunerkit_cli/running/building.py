"""Build a trainer for the command: it prints nothing itself, leaves no folder, and can be resumed exactly."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tunerkit import ConfigError
from tunerkit_cli.running.arguments import refusing
from tunerkit_cli.running.callbacks import Resumable
from tunerkit_cli.running.output import LOGS

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


def build_trainer(kind: type[Any], arguments: Any, *, callbacks: Sequence[Any] = (), **settings: Any) -> Any:
    """Build a trainer.

    A trainer creates its folder at once. The folder is created later, so that nothing is left of a run that is refused.

    Args:
        kind: The trainer's class.
        arguments: Its arguments.
        callbacks: What it calls beside the loggers of ``report_to``.
        settings: What else it is given: model, data, processor.

    Raises:
        ConfigError: The trainer refuses its arguments.
    """
    from transformers import PrinterCallback

    wanted = Path(arguments.output_dir)
    with tempfile.TemporaryDirectory() as scratch, _tensorboard_in(wanted.parent / LOGS), refusing("training"):
        arguments.output_dir = scratch
        trainer = kind(args=arguments, callbacks=[*callbacks, Resumable()], **settings)
    arguments.output_dir = trainer.args.output_dir = str(wanted)  # a trainer may copy its arguments
    trainer.remove_callback(PrinterCallback)
    trainer.get_batch_samples = partial(_batches, trainer, trainer.get_batch_samples)
    return trainer


def refuse_untrainable(trainer: Any) -> None:
    """Try out what the trainer builds only when training has begun: its optimizer, and the schedule of the rate.

    Raises:
        ConfigError: A value is one that the optimizer or the schedule refuses, a package is missing, or no batch is
            full where others are dropped.
    """
    import torch
    from transformers import get_scheduler

    arguments = trainer.args
    batches = {"train": (trainer.train_dataset, arguments.train_batch_size)}
    if trainer.eval_dataset is not None and arguments.eval_strategy != "no":
        batches["eval"] = (trainer.eval_dataset, arguments.eval_batch_size)
    for name, (rows, size) in batches.items():
        if arguments.dataloader_drop_last and len(rows) < size:
            raise ConfigError(
                [
                    f"training.dataloader_drop_last: leaves nothing of {len(rows)} {name} rows, as a batch has {size}; "
                    f"leave it out, or lower training.per_device_{name}_batch_size"
                ]
            )
    with refusing("training"):
        kind, settings = trainer.get_optimizer_cls_and_kwargs(arguments, trainer.model)
        if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & settings.keys():
            return  # it needs the model's own parameters
        optimizer = kind([torch.nn.Parameter(torch.zeros(1, 1))], **settings)
        steps = 100  # any number: the schedule is thrown away
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )


def _batches(trainer: Any, draw: Callable[..., Any], *arguments: Any) -> Any:
    """The batches of the next step; none after the last one.

    A training that ends inside an epoch, and that is resumed from its last step, goes through the rest of that epoch:
    the epoch's evaluation is still due. Without this, the trainer would take one more step first.
    """
    return ([], None) if trainer.state.global_step >= trainer.state.max_steps else draw(*arguments)


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Inside the block, TensorBoard's callback is built to write into ``folder``, unless the environment names one."""
    given = _TENSORBOARD in os.environ
    os.environ.setdefault(_TENSORBOARD, str(folder))
    try:
        yield
    finally:
        if not given:
            del os.environ[_TENSORBOARD]
