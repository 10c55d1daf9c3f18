"""``tunerkit chat``."""

from pathlib import Path
from typing import Annotated

import typer

from tunerkit_cli.commands.predict import Seed, Temperature, TopK, TopP


def chat(
    folder: Annotated[Path, typer.Argument(help="The output folder of `tunerkit train`.", metavar="OUT")],
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="The greatest length of an answer, in tokens.")] = 256,
    system: Annotated[str | None, typer.Option(help="The system's message, before yours.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
) -> None:
    """Talk to a trained language model, a line for each message; an empty line or Ctrl-D ends it."""
    from tunerkit_cli.tasks.answering import Answering

    answering = Answering(new_tokens, system, temperature, top_p, top_k, seed)
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
