"""Write an adapter in the format of another program."""

import functools
import os
from pathlib import Path
from typing import Any

from torch import nn

from tunerkit import injection, libraries, serialization
from tunerkit.config import options_from


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = libraries.DEFAULT_FORMAT,
    adapter: str | None = None,
    **options: Any,
) -> Path:
    """Write an adapter in the format of another program, such as a PEFT folder.

    Every method whose adapters add products of two small matrices can be exported, LoRA and AdaLoRA among them. Each
    format is a plugin: tunerkit-peft, tunerkit-gguf and tunerkit-diffusers.

    A new folder appears whole or not at all. Files of an older adapter in the same format are replaced; any other file
    is left alone.

    Args:
        model: The wrapped model.
        path: A folder; or a file, if the format writes a single file and the path ends as that does.
        format: The format's name.
        adapter: The adapter's name. It may be left out if the model has only one.
        **options: The format's options, such as ``form="compact"`` for ``"peft"``.

    Returns:
        The path of the folder or of the file.

    Raises:
        UnknownFormatError: No installed plugin provides the format.
        ConfigError: An option is unknown or invalid; the error lists every problem.
        AdapterError: The method adds no products, or needs steps and was trained with none; or the weights contain NaN
            or inf, or are held in shards.
        FileError: The format cannot hold this adapter, or the files cannot be written. Older ones are unchanged.
    """
    tuner = injection.tuner(model, adapter)
    found = serialization.find_format(format)
    settings = options_from(found.options, options)
    libraries.refuse_engine(injection.base_modules(tuner.model), "save")
    injection.refuse_lost([tuner])
    serialization.refuse_untrained(tuner)
    serialization.refuse_shards(tuner)
    with tuner.whole():
        serialization.refuse_diverged(tuner, serialization.tensors_of(tuner))
        serialization.warn_of_unspent_schedule(tuner)
        write = functools.partial(serialization.write_format, tuner, path, found, settings)
        written = serialization.written_once(tuner, serialization.checked_path(path), write)
        serialization.warn_of_untrained(tuner)
    injection.warn_of_base_changes([tuner])
    return written
