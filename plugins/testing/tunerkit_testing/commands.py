"""What this adds to the command ``tunerkit``: ``check`` and ``new``.

``tunerkit --help`` imports this file, so torch is imported inside the functions.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tunerkit.plugin import hookimpl


@hookimpl
def tunerkit_commands() -> Mapping[str, Callable[..., object]]:
    """Add the commands for authors of methods."""
    return {"new": new, "check": check}


def check(
    method: Annotated[
        str,
        typer.Argument(
            help="A method of `tunerkit methods`, or its plugin: my_package.loha:loha, or a module, my.gra."
        ),
    ],
    config: Annotated[
        str, typer.Option(help="Its settings: a file in YAML or JSON, or written out, as in '{\"rank\": 2}'.")
    ] = "{}",
    case: Annotated[
        list[str] | None, typer.Option(help="A model to check it on; may be repeated. Default: bert, gpt2 and llama.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="The learning rate at which the models train. Default: each model's own.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--check", help="A check to run; may be repeated. Default: all.")
    ] = None,
    expected_failure: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK=REASON", help="A check that is expected to fail, and why; may be repeated."),
    ] = None,
) -> None:
    """Check that a method keeps the contract of plugins, on small models. The exit code is 1 if it does not."""
    from tunerkit_cli.plugin import given_settings

    given = given_settings(config)
    from tunerkit_testing import checking

    if not checking.run(Console(), method, given, case or [], only or [], expected_failure or [], lr):
        raise typer.Exit(1)


def new(
    method: Annotated[str, typer.Argument(help="The new method's name, such as my-method.")],
    function: Annotated[bool, typer.Option("--function", help="One function that returns ΔW, the default.")] = False,
    low_rank: Annotated[bool, typer.Option("--low-rank", help="By hooks: two matrices of a low rank.")] = False,
    scale: Annotated[bool, typer.Option("--scale", help="A factor per feature of a target's output.")] = False,
    scheduled: Annotated[bool, typer.Option("--scheduled", help="Low-rank, with a rank that falls.")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Matrices that all targets share.")] = False,
    full_matrix: Annotated[bool, typer.Option("--full-matrix", help="A ΔW that is no product.")] = False,
    outputs: Annotated[bool, typer.Option("--outputs", help="A vector on outputs of any module.")] = False,
    fitted: Annotated[bool, typer.Option("--fitted", help="Low-rank, with a start that is fitted to data.")] = False,
    into: Annotated[Path, typer.Option(help="The folder to write the distribution's own folder into.")] = Path(),
) -> None:
    """Write a distribution with a new method, which installs and passes the conformance tests as it is."""
    from tunerkit_testing.new import NewMethodError, files_to_edit, write_distribution

    options = {"function": function, "low-rank": low_rank, "scale": scale, "scheduled": scheduled, "shared": shared}
    options |= {"full-matrix": full_matrix, "outputs": outputs, "fitted": fitted}
    chosen = [name for name, given in options.items() if given]
    if len(chosen) > 1:
        raise NewMethodError(f"choose one template, got {' and '.join(f'--{name}' for name in chosen)}")
    variant = chosen[0] if chosen else "function"
    folder = write_distribution(method, variant, into)
    typer.echo(f"written to {folder}; it works as it is: pip install -e '{folder}[test]' && tunerkit check {method}")
    typer.echo("Then make it yours:")
    for path, what in files_to_edit(method, variant).items():
        typer.echo(f"  {path}: {what}")
