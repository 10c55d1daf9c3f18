"""The commands of ``tunerkit``, which typer reads. Each call imports all: torch and transformers inside them."""

from collections.abc import Callable, Mapping
from typing import Final

from tunerkit_cli.commands.adapters import convert, diff, merge, show, verify
from tunerkit_cli.commands.installation import config, doctor, init, methods, schema
from tunerkit_cli.commands.train import train
from tunerkit_cli.commands.trained import chat, eval_, predict, report

_COMMANDS: Final = (
    *(init, train, predict, eval_, chat, merge, show, convert, verify, diff, report, methods, config, schema, doctor),
)
COMMANDS: Final[Mapping[str, Callable[..., object]]] = {each.__name__.rstrip("_"): each for each in _COMMANDS}
