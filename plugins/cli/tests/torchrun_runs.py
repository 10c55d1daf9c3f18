"""The runs of test_cli_torchrun.py, in one of several processes: ``python -m plugins.cli.tests.torchrun_runs FILE``."""

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from tests.support.train_command import command, signalled
from tunerkit_cli.machine import processes


def main(file: Path) -> None:
    """Call the commands in a file of JSON, and write what each printed; the flag ``--stop`` is Ctrl-C after step 4.

    Processes leave their group with the last command alone: there is one group for each launch.
    """
    rank, found = os.environ["RANK"], []
    commands = json.loads(file.read_text(encoding="utf-8"))
    for number, arguments in enumerate(commands, start=1):
        given = [each for each in arguments if each != "--stop"]
        is_stopped = given != arguments and rank == "1"  # the other process learns of it
        stay = mock.patch.object(processes, "leaving", nullcontext) if number < len(commands) else nullcontext()
        with stay, signalled(4, signal.SIGINT) if is_stopped else nullcontext():
            done = command(*given)
        found.append({"code": done.exit_code, "printed": done.output, "problem": repr(done.exception)})
        file.with_suffix(f".{rank}").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
