"""Commands that plugins add: the hook ``tunerkit_commands``."""

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import attrs
import pluggy

from tunerkit.cli import commands as own
from tunerkit.errors import cut, shown
from tunerkit.markers import PROJECT, hookspec

# Apart from the group of methods: `tunerkit --help` imports these modules, and a method's module imports torch.
GROUP = "tunerkit.commands"


class CommandSpecs:
    """The hook that a module in the entry-point group ``tunerkit.commands`` implements."""

    @hookspec
    def tunerkit_commands(self) -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
        """Add commands to ``tunerkit``.

        The module is imported for every call of the command, ``tunerkit --help`` included: import torch and other slow
        libraries inside the functions.

        Returns:
            For each name, such as ``"export-gguf"``, a function whose parameters typer reads as options and arguments.
            The first line of its docstring is the help. A `tunerkit.TunerkitError` becomes one line on stderr, and the
            exit code 2.
        """


@attrs.frozen
class PluginCommands:
    """The commands of all plugins by name, and what is wrong with plugins: one sentence each."""

    commands: Mapping[str, Callable[..., object]]
    problems: tuple[str, ...]


def plugin_commands(found: Iterable[EntryPoint] | None = None) -> PluginCommands:
    """Import the modules of all plugins that add commands, and ask them. No exception of a plugin passes.

    Args:
        found: The entry points; by default those of the installed distributions.
    """
    taken = {module.name for module in pkgutil.iter_modules(own.__path__)}  # no plugin replaces core's own commands
    commands: dict[str, Callable[..., object]] = {}
    problems: list[str] = []
    points = entry_points(group=GROUP) if found is None else found
    for point in sorted(points, key=lambda point: (point.dist.name if point.dist else "", point.name)):
        owner = point.dist.name if point.dist else point.value
        try:
            added = _ask(point)
        except Exception as problem:  # a plugin's own; the other commands must go on working
            text = cut(" ".join(str(problem).split()) or type(problem).__name__, 300)
            problems.append(f"the commands of {owner} cannot be loaded: {text}")
            continue
        for name, command in added.items():
            if name in taken or name in commands:
                problems.append(f"{owner}: there is a command {shown(name)} already; its author must rename it")
            else:
                commands[name] = command
    return PluginCommands(commands, tuple(problems))


def _ask(point: EntryPoint) -> Mapping[str, Callable[..., object]]:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(CommandSpecs)
    module = point.load()
    manager.register(module)
    answers: list[Any] = manager.hook.tunerkit_commands()
    if not answers:
        raise LookupError(f"{point.value} has no function tunerkit_commands marked with tunerkit.hookimpl")
    (answer,) = answers
    if not isinstance(answer, Mapping) or not all(isinstance(n, str) and callable(c) for n, c in answer.items()):
        raise TypeError(f"tunerkit_commands returned {shown(answer)}; expected a mapping of names to functions")
    return answer
