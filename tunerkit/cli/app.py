"""The command line: core's commands, and those of plugins."""

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import tunerkit
from tunerkit.cli.commands.check import check
from tunerkit.cli.commands.config import config
from tunerkit.cli.commands.doctor import doctor
from tunerkit.cli.commands.methods import methods
from tunerkit.cli.commands.new import new
from tunerkit.cli.commands.train import train
from tunerkit.cli.plugin_commands import plugin_commands
from tunerkit.errors import TunerkitError

_COMMANDS: tuple[Callable[..., object], ...] = (train, methods, config, doctor, new, check)


def run() -> None:
    """Run the command ``tunerkit``."""
    build()()


def build() -> typer.Typer:
    """Return the command with all commands, those of the installed plugins too."""
    found = plugin_commands()
    app = typer.Typer(
        help="Fine-tune a model through small adapters; every method is a plugin.",
        epilog=" ".join(f"{problem}." for problem in found.problems) or None,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    commands = {**{command.__name__: command for command in _COMMANDS}, **found.commands}
    for name, command in commands.items():
        app.command(name)(with_one_line_errors(command))
    return app


def with_one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print a `TunerkitError` of a command as one line on stderr, and exit with code 2, without a traceback."""

    @functools.wraps(command)
    def run_command(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except TunerkitError as problem:
            print(f"tunerkit: {'; '.join(str(problem).splitlines())}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run_command


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tunerkit {tunerkit.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
