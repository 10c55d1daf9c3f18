"""The command line: core's commands, and those of plugins."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

import tunerkit
from tunerkit.cli.commands.chat import chat
from tunerkit.cli.commands.check import check
from tunerkit.cli.commands.config import config
from tunerkit.cli.commands.convert import convert
from tunerkit.cli.commands.diff import diff
from tunerkit.cli.commands.doctor import doctor
from tunerkit.cli.commands.eval import evaluate
from tunerkit.cli.commands.init import init
from tunerkit.cli.commands.merge import merge
from tunerkit.cli.commands.methods import methods
from tunerkit.cli.commands.new import new
from tunerkit.cli.commands.predict import predict
from tunerkit.cli.commands.report import report
from tunerkit.cli.commands.schema import schema
from tunerkit.cli.commands.show import show
from tunerkit.cli.commands.train import train
from tunerkit.cli.commands.verify import verify
from tunerkit.cli.plugin_commands import plugin_commands
from tunerkit.errors import TunerkitError, cut

_COMMANDS: Mapping[str, Callable[..., object]] = {
    "init": init,
    "train": train,
    "predict": predict,
    "eval": evaluate,
    "chat": chat,
    "merge": merge,
    "show": show,
    "convert": convert,
    "verify": verify,
    "diff": diff,
    "report": report,
    "methods": methods,
    "config": config,
    "schema": schema,
    "doctor": doctor,
    "new": new,
    "check": check,
}


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
    for name, command in {**_COMMANDS, **found.commands}.items():
        app.command(name)(with_one_line_errors(command))
    return app


def with_one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print a `TunerkitError` of a command as one line on stderr, and exit with code 2, without a traceback.

    Ctrl-C exits with code 130, as shells have it.
    """

    @functools.wraps(command)
    def run_command(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except TunerkitError as problem:
            print(f"tunerkit: {one_line(str(problem))}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("tunerkit: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return run_command


def one_line(text: str) -> str:
    """Return a message of several lines as one, of at most 2,500 characters; a list's items are divided by ``;``."""
    whole = text.replace(":\n- ", ": ").replace("\n- ", "\n")
    return cut("; ".join(line.strip() for line in whole.splitlines()), 2500)


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
