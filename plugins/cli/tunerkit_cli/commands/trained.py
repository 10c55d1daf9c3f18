"""The commands on what `tunerkit train` wrote: predict, eval, chat and report."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from tunerkit import TunerkitError
from tunerkit.errors import half_character
from tunerkit_cli import outputs
from tunerkit_transformers.output_folder import read_run
from tunerkit_transformers.run_folder import NAME, RunError, read_record

# The endings of files for predictions, with the delimiter of a table's columns.
_ENDINGS: Final[Mapping[str, str | None]] = {".jsonl": None, ".csv": ",", ".tsv": "\t"}
_Folder = Annotated[Path, typer.Argument(help="The output folder of `tunerkit train`.", metavar="OUT")]
_Base = Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")]
_BatchSize = Annotated[int, typer.Option(min=1)]
_Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="A column that has another name than in training: --column text=review."),
]
# How answers are drawn.
_Temperature = Annotated[
    float | None, typer.Option(help="Draw words, the more freely the higher. Default: 0, the likeliest word.")
]
_TopP = Annotated[
    float | None, typer.Option(help="Draw from the likeliest words with this probability together. Default: 1.")
]
_TopK = Annotated[int | None, typer.Option(help="Draw from so many of the likeliest words. Default: all.")]
_Seed = Annotated[int | None, typer.Option(help="What the draws begin with. Default: 0.")]


def predict(
    folder: _Folder,
    text: Annotated[list[str] | None, typer.Option(help="A text to predict; may be given several times.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Rows to predict: .csv, .tsv, .json, .jsonl or .parquet, with the columns of training, or a folder of "
            "images; may be given several times."
        ),
    ] = None,
    columns: _Columns = None,
    base: _Base = None,
    out: Annotated[
        Path | None, typer.Option(help="A .jsonl, .csv or .tsv file for the predictions. Default: the terminal.")
    ] = None,
    batch_size: _BatchSize = 32,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The greatest length of a generated text, in tokens. Default: 64.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system's message, before each --text.")] = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    seed: _Seed = None,
) -> None:
    """Predict with a trained adapter: one JSON object for each row."""
    asked = text or data
    if not asked or (text and data):
        raise TunerkitError("pass --text or --data, one of them: what is to be predicted")
    for each in text or ():
        if (problem := half_character(each)) is not None:
            raise TunerkitError(f"--text: {problem}")
    if out is not None and out.suffix.lower() not in _ENDINGS:
        allowed = ", ".join(_ENDINGS)
        raise TunerkitError(f"--out {out}: predictions are written into files that end in {allowed}; rename it")
    if out is not None and out.exists():
        raise TunerkitError(f"--out {out}: there is such a file; pass a new one")
    from tunerkit_cli.preparing.checking import check_rows
    from tunerkit_cli.tasks.generating import Answering

    answering = Answering(new_tokens, system, temperature, top_p, top_k, seed)
    named = _named(columns)
    check_rows(folder, data or (), named, predicting=True)
    from tunerkit_cli.running.using import predict_rows

    answers = predict_rows(folder, asked, base=base, batch_size=batch_size, answering=answering, columns=named)
    if out is None:
        typer.echo(_lines(answers), nl=False)
    else:
        from tunerkit import serialization

        delimiter = _ENDINGS[out.suffix.lower()]
        serialization.replace(out, [(_lines(answers) if delimiter is None else _cells(answers, delimiter)).encode()])
        typer.echo(f"{len(answers)} predictions written to {out}")


def _lines(answers: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)


def _cells(answers: Sequence[Mapping[str, Any]], delimiter: str) -> str:
    """A table: a column for each value, and for each class's probability; lists are JSON, as in data files."""
    rows = []
    for answer in answers:
        row: dict[str, Any] = {}
        for name, value in answer.items():
            if isinstance(value, Mapping):
                row |= {f"{name}.{key}": each for key, each in value.items()}
            else:
                row[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def eval_(
    folder: _Folder,
    data: Annotated[
        list[Path], typer.Option(help="Rows with the columns of training, labels included; may be given several times.")
    ],
    columns: _Columns = None,
    base: _Base = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: as the run was evaluated.")] = None,
) -> None:
    """Evaluate a trained adapter on labelled rows: the metrics as JSON."""
    from tunerkit_cli.preparing.checking import check_rows

    named = _named(columns)
    check_rows(folder, data, named, predicting=False)
    from tunerkit_cli.running.using import evaluate_rows

    typer.echo(json.dumps(evaluate_rows(folder, data, base=base, batch_size=batch_size, columns=named), indent=2))


def _named(columns: Sequence[str] | None) -> dict[str, str]:
    """The names of columns by ours, from ``ours=theirs``."""
    pairs = [each.partition("=") for each in columns or ()]
    if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
        raise TunerkitError(f"--column {wrong[0]}: expected two names, as in --column text=review")
    return {ours: theirs for ours, _, theirs in pairs}


def chat(
    folder: _Folder,
    base: _Base = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="The greatest length of an answer, in tokens.")] = 256,
    system: Annotated[str | None, typer.Option(help="The system's message, before yours.")] = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    seed: _Seed = None,
) -> None:
    """Talk to a trained language model, a line for each message; an empty line or Ctrl-D ends it."""
    from tunerkit_cli.tasks.generating import Answering

    answering = Answering(new_tokens, system, temperature, top_p, top_k, seed)
    read_run(folder)  # whether it is a run, before what takes seconds to import
    from tunerkit_cli.running.using import conversation

    answer = conversation(folder, base=base, answering=answering)
    while message := _message():
        answer(message)


def _message() -> str:
    """The next message; empty at the end of the input, such as Ctrl-D."""
    try:
        return str(typer.prompt("you", default="", show_default=False)).strip()
    except typer.Abort as problem:  # typer's exception for the end of the input and for Ctrl-C
        if isinstance(problem.__context__, EOFError):
            typer.echo()
            return ""
        raise KeyboardInterrupt from problem


def report(
    out: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    others: Annotated[list[Path] | None, typer.Argument(metavar="[OTHER]...", help="Runs to compare it with.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write. Default: report.html or report-comparison.html in OUT."),
    ] = None,
) -> None:
    """Write the report of a run as one HTML file, or compare several runs."""
    from tunerkit_cli.report.html import compare, render
    from tunerkit_cli.report.record import read

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
    if not others:
        read(records[str(out)], str(out / NAME))  # its errors name the file
    page = compare(records) if others else render(records[str(out)])
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
