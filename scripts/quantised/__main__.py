"""The grid behind docs/evidence/quantised-grids.md: what works, with tunerkit and with peft; each cell is run.

Run it with a folder of a causal LM in full precision, and the forms that the installed libraries can make::

    python -m scripts.quantised MODEL [FORM ...] > rows.md
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

from scripts.quantised.forms import FORMS
from scripts.quantised.peft_row import of_peft
from scripts.quantised.training import name_of
from scripts.quantised.tunerkit_row import of_tunerkit

LIBRARIES = (
    *("tunerkit", "torch", "transformers", "peft"),
    *("bitsandbytes", "torchao", "hqq", "optimum-quanto", "gptqmodel"),
)
METHODS = ("lora", "adalora")
COLUMNS = (
    *("base", "adapter", "package"),
    *("trains after eval", "budget", "reloads equal", "resumes", "merge error", "unmerges", "dense error"),
)


def row(cells: Iterator[str]) -> list[str]:
    """The cells; the first that raises names its error, and the rest are empty."""
    found: list[str] = []
    try:
        for cell in cells:
            found.append(cell)
    except Exception as error:  # whatever a library raises is the cell
        found.append(name_of(error))
    return [*found, *["–"] * (len(COLUMNS) - 3 - len(found))]


def main(folder: str, forms: Sequence[str]) -> None:
    """Print the versions and one row for each form, method and package."""
    versions = (f"{name} {found}" for name in LIBRARIES if (found := _version(name)))
    print(", ".join([str(date.today()), *versions]), end="\n\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for form in forms:
        for method in METHODS:
            for package, cells in (("tunerkit", of_tunerkit), ("peft", of_peft)):
                print(f"| {form} | {method} | {package} | {' | '.join(row(cells(folder, form, method)))} |", flush=True)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(str(Path(sys.argv[1])), sys.argv[2:] or FORMS[:-1])
