"""Build a trainer for the command: without its own printing, without leaving a folder, and with a repeatable order."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """
    from transformers import PrinterCallback

    wanted = Path(arguments.output_dir)
    with tempfile.TemporaryDirectory() as scratch, _tensorboard_in(wanted.parent / LOGS):
        arguments.output_dir = scratch
        trainer = kind(args=arguments, callbacks=[*callbacks, Resumable()], **settings)
    arguments.output_dir = trainer.args.output_dir = str(wanted)  # a trainer may copy its arguments
    trainer.remove_callback(PrinterCallback)
    return trainer


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
