"""``tunerkit chat``."""

from pathlib import Path
from typing import Annotated

import typer


def chat(
    folder: Annotated[Path, typer.Argument(help="The output folder of `tunerkit train`.", metavar="OUT")],
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="The greatest length of an answer, in tokens.")] = 256,
) -> None:
    """Talk to a trained language model, a line for each message; an empty line ends it."""
    from tunerkit.cli.running.using import conversation

    answer = conversation(folder, base=base, new_tokens=new_tokens)
    while message := typer.prompt("you", default="", show_default=False).strip():
        typer.echo(answer(message))
