"""The commands of this plugin; torch is imported inside them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from tunerkit.plugin import hookimpl


@hookimpl
def tunerkit_commands() -> Mapping[str, Callable[..., object]]:
    """Add the commands."""
    return {"check-serving": check_serving}


def check_serving(
    path: Annotated[Path, typer.Argument(help="A PEFT folder, or a GGUF file with an adapter.", metavar="PATH")],
    engines: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="The engines, divided by commas: vllm, sglang, llama.cpp, ollama, mlx, tgi. "
            "Default: those that read such a folder, or such a file.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="The largest rank that the server was started with.")
    ] = None,
) -> None:
    """Say what engines refuse or scale wrongly in an adapter, and what to do. The exit code is 1 if they do."""
    import tunerkit_serving as serving

    named = None if engines is None else serving.chosen(engines)  # before the file: a typo is the quicker mistake
    adapter = serving.read(path)
    findings = serving.check(adapter, named or serving.usual(adapter), max_rank)
    typer.echo(serving.as_json(path, findings) if as_json else serving.as_text(path, findings))
    if any(finding.severity.is_bad for finding in findings):
        raise typer.Exit(1)
