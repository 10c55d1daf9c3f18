"""``tunerkit report``."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tunerkit_cli import outputs
from tunerkit_transformers.run_folder import NAME, RunError, read_record


def report(
    out: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    others: Annotated[list[Path] | None, typer.Argument(metavar="[OTHER]...", help="Runs to compare it with.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write. Default: report.html or report-comparison.html in OUT."),
    ] = None,
) -> None:
    """Write the report of a run as one HTML file, or compare several runs."""
    folders = [out, *(others or [])]
    names = [str(folder) for folder in folders]
    places = [os.path.realpath(folder) for folder in folders]  # pathlib's raises in a loop of links
    twice = [name for name, place in zip(names, places, strict=True) if places.count(place) > 1]
    if twice:
        raise RunError(f"{twice[0]}: is given twice; name each run once")
    if file is not None and os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
        raise RunError(f"--out {file}: is no file but a device or a pipe, which would be replaced; name a file")
    if file is not None and os.path.isdir(file):  # Path.is_dir raises where a name is too long
        raise RunError(f"--out {file}: is a folder; name a file in it, such as {file / 'report.html'}")
    records = {name: read_record(folder) for name, folder in zip(names, folders, strict=True)}
    page = _page(records)
    path = file or out / ("report-comparison.html" if others else "report.html")
    outputs.prepare(path.parent)
    try:
        # Not by core's own functions, which import torch.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
            whole = Path(scratch, path.name)
            whole.write_text(page, encoding="utf-8")
            whole.replace(path)
    except OSError as problem:
        raise RunError(f"{path}: cannot be written: {problem.strerror}; choose another file with --out") from problem
    typer.echo(path)


def _page(records: Mapping[str, Mapping[str, Any]]) -> str:
    from tunerkit_cli.report.html import compare, render
    from tunerkit_cli.report.record import RecordError

    if len(records) > 1:
        return compare(records)
    ((name, record),) = records.items()
    try:
        return render(record)
    except RecordError as problem:
        raise RecordError(f"{Path(name, NAME)}: {problem}") from problem
