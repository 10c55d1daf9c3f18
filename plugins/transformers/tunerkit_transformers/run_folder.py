"""Read the record of a run from its output folder, and convert the paths in it."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from tunerkit.errors import TunerkitError

NAME: Final = "run.json"
RECIPE: Final = "recipe.yaml"  # which a run has from its beginning, and its record only at its end
LIST: Final = "written.json"  # of the files that the run wrote


class RunError(TunerkitError):
    """A folder has no record of a run, or the record cannot be read."""


def read_record(folder: Path) -> Mapping[str, Any]:
    """Return the JSON record in ``folder``. Its values are checked where they are used.

    Raises:
        RunError: There is no such folder, it has no record, or the record is not a JSON object.
    """
    path = folder / NAME
    if (what := irregular(path)) is not None:
        raise RunError(f"{path}: is {what}, not a file; restore what `tunerkit train` wrote, or train again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(_absent(folder)) from None
    except OSError as problem:
        raise RunError(f"{path}: cannot be read: {problem.strerror}; check its permissions") from problem
    except (ValueError, RecursionError) as problem:
        reason = " ".join(str(problem).split())
        raise RunError(f"{path}: is not the JSON that `tunerkit train` writes: {reason}; train again") from problem
    if not isinstance(found, dict):
        raise RunError(f"{path}: expected a JSON object, got a {type(found).__name__}; train again")
    return found


def stated(path: str, folder: Path) -> str:
    """Return a path as a run's files record it: without the user's name, since the files may be published.

    A path below ``folder`` begins with ``./``, another path below the home folder with ``~/``; both then have slashes
    on every system. Any other path is unchanged.
    """
    alike = os.path.normcase(path)  # on Windows, capitals and the slash are no matter
    for top, short in ((os.path.abspath(folder), "."), (os.path.expanduser("~"), "~")):
        for each in map(os.path.normcase, (top, os.path.realpath(top))):
            if alike.startswith(f"{each}{os.sep}") and each != os.sep:
                return short + path[len(each) :].replace(os.sep, "/")
    return path


def placed(path: str, folder: Path) -> str:
    """Return the path on this machine for a path from `stated`; ``folder`` is where the run's folder is now."""
    if path.startswith((".\\", "~\\")):  # as an earlier version wrote it on Windows
        path = path.replace("\\", "/")
    if path.startswith("./"):
        return os.path.join(os.path.abspath(folder), path[2:])
    return os.path.expanduser(path)


def irregular(path: Path) -> str | None:
    """Describe a path that is not a regular file, such as ``"a pipe"``; None for a file or a missing path.

    Check this before opening: opening a pipe blocks until another program writes to it.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # opening it raises the reason
        return None
    if stat.S_ISREG(mode):
        return None
    return "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"


def _absent(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; pass one that `tunerkit train --out` has written"
    if not folder.is_dir():
        return f"{folder}: is a file; pass the folder that `tunerkit train --out` has written"
    if (folder / RECIPE).is_file():
        return f"{folder}: the training has not ended; continue it with `tunerkit train --out {folder} --resume`"
    if (folder / "adapter.safetensors").is_file():
        return f"{folder} has an adapter but no {NAME}: load it with tunerkit.load(base, {str(folder)!r})"
    if (folder / "config.json").is_file():
        return f"{folder} is the folder of a model, not of a run; pass one that `tunerkit train --out` has written"
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{NAME}"))
    more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
    hint = (
        f"did you mean {', '.join(inside[:3])}{more}?" if inside else "pass one that `tunerkit train --out` has written"
    )
    return f"{folder}: has no {NAME}, so it is not the output folder of a finished run; {hint}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
