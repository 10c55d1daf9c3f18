"""The commands of this plugin; torch is imported inside them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final

import typer

from tunerkit.plugin import hookimpl

_ADDRESS: Final = "A running vLLM's address, such as http://localhost:8000; an SGLang's after sglang+."


@hookimpl
def tunerkit_commands() -> Mapping[str, Callable[..., object]]:
    """Add the commands."""
    return {"check-serving": check_serving, "publish": publish, "check-rollout": check_rollout}


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


def publish(
    path: Annotated[
        Path,
        typer.Argument(
            help="A PEFT folder, which is published as it is, or the folder of a finished run.", metavar="PATH"
        ),
    ],
    to: Annotated[str, typer.Option("--to", help=_ADDRESS)],
    keep: Annotated[int, typer.Option(min=1, help="How many versions of this folder's name stay loaded.")] = 2,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank, for a run. Default: the least that fits.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where versions are written, which the server reads too. Default: tunerkit-published."),
    ] = None,
) -> None:
    """Load an adapter into a running vLLM or SGLang, and print its name there, which requests name as their model."""
    import tunerkit
    import tunerkit_serving as serving
    from tunerkit_serving.adapter_folder import CONFIG
    from tunerkit_serving.publishing import server_at

    server_at(to)  # before the model: a typo is the quicker mistake
    source = path if (path / CONFIG).is_file() else tunerkit.from_folder(path)[0]
    prefix = re.sub(r"[^A-Za-z0-9._-]+", "-", path.absolute().name).strip(".-_")[:64] or "adapter"
    typer.echo(serving.publisher(source, to, keep=keep, rank=rank, folder=folder, prefix=prefix).publish())


def check_rollout(
    path: Annotated[Path, typer.Argument(help="The folder of a finished run.", metavar="OUT")],
    engine: Annotated[str, typer.Option("--engine", help=_ADDRESS)],
    version: Annotated[
        str | None,
        typer.Option(help="A version that the server has. Default: one is published for the comparison."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where versions are written, which the server reads too. Default: tunerkit-published."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare what an adapter computes here and in an engine, and name what is wrong. Then the exit code is 1."""
    import tunerkit
    import tunerkit_serving as serving
    from tunerkit_serving.publishing import server_at

    server_at(engine)  # before the model: a typo is the quicker mistake
    model, tokenizer = tunerkit.from_folder(path)
    found = serving.check_rollout(model, engine, version=version, tokenizer=tokenizer, folder=folder)
    typer.echo(serving.agreement_as_json(found) if as_json else serving.agreement_as_text(found))
    if found.cause is not None:
        raise typer.Exit(1)
