"""Run the fault suite: ``python -m tests.faults --help``."""

import argparse
import sys

from tests.faults.harness import is_long, run
from tests.faults.table import ROWS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Inject faults, and count failures.")
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--subject")
    parser.add_argument("--count", type=int)
    chosen = parser.parse_args()
    for row in ROWS:
        if chosen.rows and row.name not in chosen.rows:
            continue
        for name in [chosen.subject] if chosen.subject else ["tunerkit", "peft"]:
            if name == "peft" and row.peft:
                continue
            result = run(row, name, chosen.count or (row.long if chosen.long or is_long() else row.short))
            print(f"{result.seconds:.1f} s:", result, flush=True)
    return 0


sys.exit(main()) if __name__ == "__main__" else None
