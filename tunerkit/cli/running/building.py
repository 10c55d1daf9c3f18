"""Build a trainer for the command: it prints nothing itself, leaves no folder, and can be resumed exactly."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tunerkit.cli.running.arguments import refusing
from tunerkit.cli.running.callbacks import Resumable
from tunerkit.cli.running.output import LOGS

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
