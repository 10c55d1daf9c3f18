"""Write the base model with an adapter of any format in its weights."""

from pathlib import Path
from typing import Any

import tunerkit
from tunerkit_cli.converting.opening import load_adapter, load_base
from tunerkit_cli.converting.remarks import collected
from tunerkit_cli.outputs import new_folder
from tunerkit_transformers.base_choice import choose_base
from tunerkit_transformers.pretrained import quiet

_PROCESSORS = ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor")


def merge_adapter(source: str, out: Path, *, base: str | None, task: str | None) -> tuple[str, ...]:
    """Write the merged model, in the dtype of the base's files, and the base's tokenizer or processor if it has one.

    Args:
        source: The adapter, in any format.
        out: A new folder.
        base: The folder of the base; None for what the adapter's files say.
        task: The task, if it does not follow from the files.

    Returns:
        What the user should know.

    Raises:
        TunerkitError: The adapter or its base cannot be loaded, or the folder cannot be written.
    """
    quiet()
    with collected() as remarks:
        chosen = choose_base(source, base=base, task=task)
        with new_folder(out) as scratch:
            model: Any = load_base(chosen, keep_dtype=True)  # Any: of transformers or diffusers
            load_adapter(model, source, chosen)
            tunerkit.unwrap(model, keep_merged=True)
            model.save_pretrained(scratch)
            _copy_processor(chosen.source, scratch)
    return tuple(remarks)


def _copy_processor(source: str, folder: Path) -> None:
    """Save the first kind of processor that the base has; a base of hidden states alone may have none."""
    import transformers

    for name in _PROCESSORS:
        try:
            processor = getattr(transformers, name).from_pretrained(source)
        except Exception:  # what a library raises where a folder has no such file differs between its classes
            continue
        processor.save_pretrained(folder)
        return
