"""Write adapters in the formats of other programs, and load a base model with its adapter from a folder."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from tunerkit import hooks, injection, serialization
from tunerkit.config import options_from
from tunerkit.errors import FileError
from tunerkit.serialization import DEFAULT_FORMAT


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = DEFAULT_FORMAT,
    adapter: str | None = None,
    **options: Any,
) -> Path:
    """Write an adapter in the format of another program, such as a PEFT folder. Each format is a plugin.

    Every method whose ΔW is a product of two small matrices can be exported, including LoRA and AdaLoRA. A new folder
    appears complete or not at all. Files of an older adapter in the same format are replaced, but no other files.

    Args:
        model: The wrapped model.
        path: A folder; or a file, if the format writes a single file and the path has the same suffix.
        format: The format's name.
        adapter: The adapter's name. It may be left out if the model has only one.
        **options: The format's options, such as ``form="compact"`` for ``"peft"``.

    Returns:
        The path of the folder or of the file.

    Raises:
        UnknownFormatError: No installed plugin provides the format.
        ConfigError: An option is unknown or invalid; the error lists every problem.
        AdapterError: The method's ΔW is not a product, or it needs steps and was trained for none; or the weights
            contain NaN or inf, or are sharded.
        FileError: The format does not support this adapter, or the files cannot be written. Older files are unchanged.
    """
    tuner, place = injection.tuner(model, adapter), serialization.checked_path(path)
    found = serialization.find_format(format)
    settings = options_from(found.options, options)

    def write() -> Path:
        serialization.tensors_of(tuner)  # raises for NaN and inf
        return serialization.write_format(tuner, place, found, settings)

    written = serialization.write_trained(tuner, place, write)
    injection.warn_of_base_changes([tuner])
    return written


def from_folder(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
    """Load a base model, its adapter and its processor from a folder of ``tunerkit train`` or PEFT.

    Both are ready for ``transformers.pipeline``::

        model, tokenizer = tunerkit.from_folder("out")
        classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)

    Args:
        path: The folder, or the name of an adapter on the hub.
        base: The base model's folder or its name on the hub, if it has moved since training.

    Returns:
        The model in eval mode, with its adapter, and the tokenizer or image processor, or None without one.

    Raises:
        FileError: The folder does not name its base model, or a file in it is missing or damaged.
        BaseMismatchError: ``base`` is not the model that was trained.
        TunerkitError: transformers cannot load the base model.
    """
    base = None if base is None else os.path.expanduser(base)
    if found := hooks.first(hooks.specs.tunerkit_open_run, path=Path(os.path.expanduser(path)), base=base):
        return found
    lacking = hooks.registry.lacking("reads what `tunerkit train` writes")
    raise FileError(
        f"{os.fspath(path)}: no installed plugin supports this folder. {f'{lacking}. ' if lacking else ''}To load an "
        "adapter's file, call tunerkit.load(base, path)"
    )
