"""``tunerkit predict``."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final

import typer

from tunerkit import TunerkitError
from tunerkit.errors import half_character

# The endings of files for predictions, with the delimiter of a table's columns.
_ENDINGS: Final[Mapping[str, str | None]] = MappingProxyType({".jsonl": None, ".csv": ",", ".tsv": "\t"})


# How answers are drawn; `tunerkit chat` has the same options.
Temperature = Annotated[
    float | None, typer.Option(help="Draw words, the more freely the higher. Default: 0, the likeliest word.")
]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the likeliest words with this probability together. Default: 1.")
]
TopK = Annotated[int | None, typer.Option(help="Draw from so many of the likeliest words. Default: all.")]
Seed = Annotated[int | None, typer.Option(help="What the draws begin with. Default: 0.")]


def predict(
    folder: Annotated[Path, typer.Argument(help="The output folder of `tunerkit train`.", metavar="OUT")],
    text: Annotated[list[str] | None, typer.Option(help="A text to predict; may be given several times.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Rows to predict: .csv, .tsv, .jsonl or .parquet, with the columns of training, or a folder of "
            "images; may be given several times."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .jsonl, .csv or .tsv file for the predictions. Default: the terminal.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The greatest length of a generated text, in tokens. Default: 64.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system's message, before each --text.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
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
    from tunerkit_cli.tasks.answering import Answering

    answering = Answering(new_tokens, system, temperature, top_p, top_k, seed)
    from tunerkit_cli.running.using import predict_rows

    answers = predict_rows(folder, asked, base=base, batch_size=batch_size, answering=answering)
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
            row |= (
                {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
            )
        rows.append(
            {
                name: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
                for name, value in row.items()
            }
        )
    out = io.StringIO(newline="")
    writer = csv.DictWriter(
        out, list(dict.fromkeys(name for row in rows for name in row)), delimiter=delimiter, lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
