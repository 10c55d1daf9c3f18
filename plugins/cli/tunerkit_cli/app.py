"""The command line: its own commands, and those of plugins."""

import errno
import io
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
import typer.core
from rich.console import Console

import tunerkit
from tunerkit.errors import TunerkitError, half_character
from tunerkit.extras import install
from tunerkit_cli.commands import COMMANDS
from tunerkit_cli.machine import processes
from tunerkit_cli.plugin_commands import additions, commands_of
from tunerkit_cli.recipes.reading import key_for, keys_of
from tunerkit_cli.recipes.setting import FLAGS
from tunerkit_cli.telling import one_line, telling_warnings

# Their warnings at import are of builds and releases, not of what the user does: transformers imports torchao wherever
# it is installed.
_LOUD = ("torchao", "bitsandbytes", "torch.utils")
_IN_FULL = "TUNERKIT_TRACEBACK"  # the environment variable with which errors of our own are printed in full
# The commands that other distributions of ours add, with the extra that brings each.
_ELSEWHERE: Mapping[str, str] = {"check": "testing", "new": "testing", "check-serving": "serving", "publish": "serving"}


def run() -> None:
    """Run the command ``tunerkit``."""
    if processes.count() > 1:  # DDP warns in each process that it looks for parameters without a gradient
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else a character that the terminal lacks ends the command
            stream.reconfigure(errors="backslashreplace")
    with one_line_errors():
        try:
            build()()
        finally:
            _flush()


def _flush() -> None:
    """Write what is buffered now: at the exit of the interpreter it is too late to say what is wrong."""
    try:
        if sys.stdout is not None:  # as it is for a command whose output is closed
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter tries again
        raise


def build() -> typer.Typer:
    """Return the command with all commands, those of the installed plugins too."""
    added = additions()
    commands, taken = commands_of(added, COMMANDS)
    problems = (*(each.problem for each in added if each.problem), *taken, *keys_of(added)[1])
    app = typer.Typer(
        help="Fine-tune a model through small adapters; every method is a plugin.",
        epilog=" ".join(f"{problem}." for problem in problems) or None,
        context_settings={"obj": problems},  # `tunerkit doctor` prints them
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_options)
    for name, command in {**COMMANDS, **commands}.items():
        app.command(name, cls=_Train if name == "train" else None)(one_line_errors()(command))
    for name in _ELSEWHERE.keys() - commands.keys():
        anything = {"ignore_unknown_options": True, "allow_extra_args": True}
        app.command(name, hidden=True, context_settings=anything)(one_line_errors()(_refuse_absent))
    return app


class _Train(typer.core.TyperCommand):
    """``train``, where an option of another command leads to ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as problem:  # click's, which typer has under a private name
            if (key := key_for(getattr(problem, "option_name", "").lstrip("-").replace("-", "_"))) is not None:
                flags = [f"--{name.replace('_', '-')}" for name, sets in FLAGS.items() if sets == key]
                do = flags[0] if flags else f"--set {shlex.quote(key) if '=' in key else f'{key}=VALUE'}"
                problem.message += f"; did you mean {do}?"  # type: ignore[attr-defined]
                problem.possibilities = ()  # type: ignore[attr-defined]
            raise


def _refuse_absent(context: typer.Context) -> None:
    extra = _ELSEWHERE[str(context.info_name)]
    raise TunerkitError(f"{context.info_name} comes with tunerkit-{extra}, which is not installed: {install(extra)}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an exception into a line on stderr and an exit code, 2 if a user can help it; our warnings are lines too."""
    try:
        with telling_warnings(Console(stderr=True, quiet=not processes.is_first())):
            yield
    except (typer.Exit, typer.Abort, typer.BadParameter):  # typer's own
        raise
    except TunerkitError as problem:
        _end(2, one_line(str(problem)))
    except BrokenPipeError:
        sys.exit(128 + signal.SIGPIPE)  # as shells have it
    except KeyboardInterrupt:
        _end(130, "interrupted")
    except UnicodeEncodeError as problem:
        wrong = half_character(problem.object) or f"it has no {problem.object[problem.start]!r}"
        _end(2, f"a text, a name or a path cannot be written as {problem.encoding}: {wrong}")
    except Exception as problem:
        if (refused := _refused(problem)) is not None:
            _end(2, one_line(refused))
        if os.environ.get(_IN_FULL):
            raise
        notes = getattr(problem, "__notes__", ())  # name the plugin that raised it
        what = one_line("; ".join([f"{type(problem).__name__}: {problem}", *notes]))
        _end(1, f"internal error: {what}; {_where_the_trace_is(problem)}")


def _end(code: int, line: str) -> NoReturn:
    if processes.is_first() if code == 130 else processes.reports_error():
        print(f"tunerkit: {line}", file=sys.stderr)
    sys.exit(code)


def _refused(problem: BaseException | None) -> str | None:
    """What the system refused, and where; None if neither the exception nor its cause says such a thing."""
    while problem is not None:
        if isinstance(problem, OSError):
            if problem.errno is None:  # that of a library, in its own words
                return str(problem)
            place = "" if problem.filename is None else f"{os.fsdecode(problem.filename)}: "
            return f"{place}{problem.strerror}{_advice(problem.errno)}"
        if (
            found := re.search(r"\(os error (\d+)\)", str(problem))
        ) is not None:  # safetensors writes its files in Rust
            return f"a file cannot be read or written: {os.strerror(int(found[1]))}{_advice(int(found[1]))}"
        problem = problem.__cause__
    return None


def _advice(number: int) -> str:
    """What to do about an error of the system; empty if its own words say it."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; free some space, or choose a place on another disk"
    return "; check its permissions" if number in (errno.EACCES, errno.EPERM, errno.EROFS) else ""


def _where_the_trace_is(problem: Exception) -> str:
    try:
        number, path = tempfile.mkstemp(prefix="tunerkit-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"tunerkit {tunerkit.__version__}, Python {sys.version}\n{sys.argv}\n\n")
            traceback.print_exception(problem, file=file)
    except OSError as full:
        return f"the full trace cannot be written ({full.strerror}): set {_IN_FULL}=1 to print it; please report it"
    return f"the full trace is in {path}; please report it"


def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"tunerkit {tunerkit.__version__}")
        raise typer.Exit
