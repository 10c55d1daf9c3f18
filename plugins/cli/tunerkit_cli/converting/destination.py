"""Where ``tunerkit convert`` may write: into a new place, or over an older adapter if the user says so."""

import os
from pathlib import Path
from typing import Final

from tunerkit import TunerkitError, serialization
from tunerkit.extras import READERS

_WEIGHTS: Final = (".safetensors", ".bin")
# Files with such endings that are no weights of a model.
_OTHERS: Final = (
    "adapter.safetensors",
    "training_args.bin",
    *(name for each in READERS for name in each.files),
)


def refuse_occupied(out: Path, *, overwrite: bool) -> None:
    """Raise `TunerkitError` if ``out`` holds something that the adapter must not be mixed with.

    Args:
        out: The folder or the file that is to be written.
        overwrite: Whether an older adapter may be replaced. A model never is: transformers applies an adapter that lies
            in its folder, so all who load the model would get another one.
    """
    try:
        # What a writer that was killed has left is removed by the next one.
        names = sorted(name for name in os.listdir(out) if not name.startswith(serialization.SCRATCH))
    except (OSError, ValueError):  # it is no folder, or none that can be read, as writing will say
        names = []
    weights = [name for name in names if name.endswith(_WEIGHTS) and name not in _OTHERS]
    if "config.json" in names and weights:
        raise TunerkitError(
            f"--out {out}: the folder holds a model ({weights[0]}), and transformers would load the adapter together "
            "with it; pass another folder"
        )
    if overwrite:
        return
    if names:
        raise TunerkitError(
            f"--out {out}: the folder is not empty; pass a new one, or --overwrite to replace an older adapter in it"
        )
    if os.path.isfile(out):
        raise TunerkitError(f"--out {out}: there is such a file; pass a new one, or --overwrite to replace it")
