"""A process that takes timed steps with the code of one checkout, so that two can be timed in the same rounds.

It is run by path: the benchmark comes from the folder that holds this file, tunerkit and its plugins from the checkout.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any


def main(checkout: Path) -> None:
    """Read requests from standard input, one line of JSON each, and answer each with a line."""
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder, which has a `statistics`
    import benchmarks.speed  # noqa: F401  # of this folder, whatever the checkout has

    sys.path[:1] = [str(checkout), *map(str, sorted(checkout.glob("plugins/*")))]
    import tunerkit
    from benchmarks.speed import contenders, shapes
    from benchmarks.speed.timing import seconds

    if not Path(tunerkit.__file__).is_relative_to(checkout):  # the installed one, in silence
        sys.exit(f"{checkout} is no checkout of tunerkit: there is no package in it")

    answer, sys.stdout = sys.stdout, sys.stderr
    training: dict[str, contenders.Contender] = {}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "shape" in request:
            training.clear()
            training.update(shapes.build(**request))
            found: object = {name: each.workload.adapted for name, each in training.items()}
        elif "step" in request:
            gc.disable()
            found = seconds(training[request["step"]].step)
            gc.enable()
        else:
            found = gc.collect()
        print(json.dumps(found), file=answer, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
