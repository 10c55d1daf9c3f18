"""The tables behind docs/evidence/scaling-grids.md: what works with which engine, and what it costs.

Run it on an idle machine; the first table takes ten minutes, for each number of processes::

    python -m scripts.scaling cells [PROCESSES]
    python -m scripts.scaling zero [PROCESSES]    with the Python of .venv-deepspeed
    python -m scripts.scaling collectives
    python -m scripts.scaling targets
    python -m scripts.scaling sizes
"""

import sys
import warnings

from scripts.scaling import cells, collectives, sizes, targets, zero

TABLES = {
    "cells": cells.main,
    "zero": zero.main,
    "collectives": collectives.main,
    "targets": targets.main,
    "sizes": sizes.main,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    name, *arguments = sys.argv[1:] or ["cells"]
    if name not in TABLES:
        raise SystemExit(f"no table named {name!r}; there are: {', '.join(TABLES)}")
    TABLES[name](*map(int, arguments))
