"""How to use what a run wrote: a few lines of Python, and a command."""

import json
import shlex
from typing import Final

import attrs

from tunerkit.report.record import Run

_TEXT: Final = 'model(**processor("Some text.", return_tensors="pt"))'
_GENERATED: Final = 'model.generate(**processor("Some text.", return_tensors="pt"))'
_CALLS: Final = {
    "image-classification": 'model(**processor(image, return_tensors="pt"))  # image: a PIL image',
    **dict.fromkeys(("causal-lm", "preference", "seq2seq"), _GENERATED),
}


@attrs.frozen
class Loading:
    """Three lines of Python, and the commands that predict new rows or serve the model."""

    python: str
    shell: str


def loading(run: Run) -> Loading:
    """Return how to load the run's folder; where the recipe doesn't name it, the folder is called ``OUT``."""
    out = run.recipe.get("out")
    folder = out if isinstance(out, str) and out else "OUT"
    name = json.dumps(folder, ensure_ascii=False)
    lines = ["import tunerkit", f"model, processor = tunerkit.from_folder({name})"]
    lines.append(f"outputs = {_CALLS.get(run.task, _TEXT)}")
    what = "--data rows.csv" if run.task == "image-classification" else '--text "Some text."'
    return Loading("\n".join(lines), f"tunerkit predict {shlex.quote(folder)} {what}")
