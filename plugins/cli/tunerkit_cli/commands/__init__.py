"""The commands of ``tunerkit``, which typer reads. Each call imports all: torch and transformers inside them."""

from collections.abc import Callable, Mapping
from typing import Final

from tunerkit_cli.commands.adapters import convert, diff, merge, show, verify
from tunerkit_cli.commands.installation import config, doctor, init, methods, schema
from tunerkit_cli.commands.sweep import sweep
from tunerkit_cli.commands.train import train
from tunerkit_cli.commands.trained import chat, eval_, predict, report

_OF_RUNS: Final = (init, train, sweep, predict, eval_, chat)
_OF_ADAPTERS: Final = (merge, show, convert, verify, diff)
_COMMANDS: Final = (*_OF_RUNS, *_OF_ADAPTERS, report, methods, config, schema, doctor)
COMMANDS: Final[Mapping[str, Callable[..., object]]] = {each.__name__.rstrip("_"): each for each in _COMMANDS}
