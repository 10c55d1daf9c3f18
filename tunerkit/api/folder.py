"""Load what ``tunerkit train`` wrote."""

import os
from pathlib import Path
from typing import Any

from tunerkit import hooks
from tunerkit.errors import FileError
from tunerkit.extras import RUNS, distribution, install


def from_folder(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
    """Load the base model, its adapter and its processor from the output folder of ``tunerkit train``.

    Both are ready for ``transformers.pipeline``::

        model, tokenizer = tunerkit.from_folder("out")
        classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
        classify("A wonderful film.")

    Args:
        path: The folder.
        base: Where the base model is, if it is no longer where it was at training: a folder, or a name on the hub.

    Returns:
        The model in eval mode, with its adapter, and the tokenizer or image processor.

    Raises:
        FileError: It is no output folder, or a file in it is missing or damaged.
        BaseMismatchError: ``base`` is another model than the one that was trained.
        TunerkitError: transformers cannot load the base from there.
    """
    found = hooks.open_run(Path(path), None if base is None else os.fspath(base))
    if found is None:
        reader = distribution(RUNS)
        raise FileError(
            f"{os.fspath(path)}: no installed plugin knows this folder. What `tunerkit train` writes is read by "
            f"{reader}, and {hooks.registry.absence(reader)} ({install(RUNS)}); an adapter's file, by "
            "tunerkit.load(base, path)"
        )
    return found
