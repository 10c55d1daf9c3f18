"""``tunerkit predict``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tunerkit import TunerkitError
from tunerkit.errors import half_character


def predict(
    folder: Annotated[Path, typer.Argument(help="The output folder of `tunerkit train`.", metavar="OUT")],
    text: Annotated[list[str] | None, typer.Option(help="A text to predict; may be given several times.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows to predict: .csv, .tsv, .jsonl or .parquet, with the columns of training.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .jsonl file for the predictions. Default: the terminal.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The greatest length of a generated text, in tokens. Default: 64.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system's message, before each --text.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Draw words, the more freely the higher. Default: 0, the likeliest word.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest words with this probability together. Default: 1.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest words. Default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="What the draws begin with. Default: 0.")] = None,
) -> None:
    """Predict with a trained adapter: one JSON object for each row."""
    asked = text or data
    if asked is None or (text and data is not None):
        raise TunerkitError("pass --text or --data, one of them: what is to be predicted")
    for each in text or ():
        if (problem := half_character(each)) is not None:
            raise TunerkitError(f"--text: {problem}")
    if out is not None and out.exists():
        raise TunerkitError(f"--out {out}: there is such a file; pass a new one")
    from tunerkit.cli.tasks.answering import Answering

    answering = Answering(new_tokens, system, temperature, top_p, top_k, seed)
    from tunerkit.cli.running.using import predict_rows

    answers = predict_rows(folder, asked, base=base, batch_size=batch_size, answering=answering)
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if out is None:
        typer.echo(lines, nl=False)
    else:
        from tunerkit import serialization

        serialization.replace(out, [lines.encode()])
        typer.echo(f"{len(answers)} predictions written to {out}")
