"""Run the fault suite: ``python -m tests.faults --help``."""

import argparse
import sys

from tests.faults.harness import LONG, Result, is_long, run
from tests.faults.report import write
from tests.faults.table import ROWS


def main() -> int:
    """Run rows, print their failures, and say by the exit code whether tunerkit has any."""
    chosen = _arguments()
    results: list[Result] = []
    for row in ROWS:
        if chosen.row and row.name not in chosen.row:
            continue
        for name in [chosen.subject] if chosen.subject else ["tunerkit", "peft"]:
            if name == "peft" and row.peft:
                continue
            results.append(run(row, name, row.long if chosen.long or is_long() else row.short))
            print(f"{results[-1]}\n  {results[-1].seconds:.1f} CPU seconds", flush=True)
            if chosen.write:
                write(results)
    return int(any(found.failures for found in results if found.subject == "tunerkit"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Inject faults and count failures.")
    parser.add_argument("--row", action="append", help="the name of a row; by default all of them")
    parser.add_argument("--subject", choices=("tunerkit", "peft"), help="one column; by default both")
    parser.add_argument("--long", action="store_true", help=f"all cases of the published table (also {LONG}=1)")
    parser.add_argument("--write", action="store_true", help="write the results into docs/concepts/reliability.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
