"""The commands of ``tunerkit``, which typer reads. Each call imports all: torch and transformers inside them."""

from collections.abc import Callable, Mapping
from typing import Final

from tunerkit_cli.commands.adapters import convert, diff, merge, show, verify
from tunerkit_cli.commands.installation import config, doctor, init, methods, schema
from tunerkit_cli.commands.train import train
from tunerkit_cli.commands.trained import chat, evaluate, predict, report

COMMANDS: Final[Mapping[str, Callable[..., object]]] = {
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
}
