"""What plugins add to the command: commands, and keys of recipes."""

from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import attrs
import pluggy

from tunerkit.errors import cut, shown

Command = Callable[..., object]

# Apart from the group of methods: `tunerkit --help` imports these modules, and a method's module imports torch.
GROUP = "tunerkit.commands"


hookspec = pluggy.HookspecMarker("tunerkit")


class CommandSpecs:
    """The hooks that a module in the entry-point group ``tunerkit.commands`` implements, one of them or both."""

    @hookspec
    def tunerkit_commands(self) -> Mapping[str, Command]:  # type: ignore[empty-body]
        """Add commands to ``tunerkit``.

        The module is imported for every call of the command, ``tunerkit --help`` included: import torch and other slow
        libraries inside the functions.

        Returns:
            For each name, such as ``"export-gguf"``, a function whose parameters typer reads as options and arguments.
            The first line of its docstring is the help. A `tunerkit.TunerkitError` becomes one line on stderr, and the
            exit code 2.
        """

    @hookspec
    def tunerkit_recipe_keys(self) -> Mapping[str, Mapping[str, Any]]:  # type: ignore[empty-body]
        """Add top-level keys to recipes. Their values arrive in ``Recipe.extra``.

        Returns:
            For each key, such as ``"acme"``, a dict with its JSON schema. A recipe is checked against it, and
            `tunerkit schema` prints it. It has a ``description``, and may have ``type``, ``default``, ``examples``,
            ``enum``, ``minimum``, ``maximum``, ``minLength``, ``items``, ``properties`` and ``additionalProperties``.
        """


@attrs.frozen
class Addition:
    """What a distribution adds: commands, and keys of recipes with their JSON schema; or why it adds none."""

    owner: str
    commands: Mapping[str, Command] = attrs.field(factory=dict)
    recipe_keys: Mapping[str, Any] = attrs.field(factory=dict)
    problem: str = ""


def additions(found: Iterable[EntryPoint] | None = None) -> tuple[Addition, ...]:
    """Import the modules of all plugins that extend the command, and ask them. No exception of a plugin passes."""
    points = entry_points(group=GROUP) if found is None else found
    return tuple(map(_added, sorted(points, key=lambda point: (point.dist.name if point.dist else "", point.name))))


def commands_of(added: Iterable[Addition], ours: Collection[str]) -> tuple[dict[str, Command], tuple[str, ...]]:
    """Return the commands of plugins by name, and a sentence on each that is left out, as its name is taken."""
    commands: dict[str, Command] = {}
    problems: list[str] = []
    for each in added:
        for name, command in each.commands.items():
            if name in ours or name in commands:
                problems.append(f"{each.owner}: there is a command {shown(name)} already; its author must rename it")
            else:
                commands[name] = command
    return commands, tuple(problems)


def _added(point: EntryPoint) -> Addition:
    owner = point.dist.name if point.dist else point.value
    try:
        return Addition(owner, *_ask(point))
    except Exception as problem:  # a plugin's own; the other commands must go on working
        text = cut(" ".join(str(problem).split()) or type(problem).__name__, 300)
        return Addition(owner, problem=f"the commands of {owner} cannot be loaded: {text}")


def _ask(point: EntryPoint) -> tuple[Mapping[str, Command], Mapping[str, Any]]:
    manager = pluggy.PluginManager("tunerkit")
    manager.add_hookspecs(CommandSpecs)
    manager.register(point.load())
    commands: list[Any] = manager.hook.tunerkit_commands()
    keys: list[Any] = manager.hook.tunerkit_recipe_keys()
    if not commands and not keys:
        raise LookupError(
            f"{point.value} has no function tunerkit_commands marked with tunerkit.hookimpl, and no "
            "tunerkit_recipe_keys either"
        )
    if not all(_is_named(answer) and all(map(callable, answer.values())) for answer in commands):
        raise TypeError(f"tunerkit_commands returned {shown(commands[0])}; expected a mapping of names to functions")
    if not all(map(_is_named, keys)):
        raise TypeError(f"tunerkit_recipe_keys returned {shown(keys[0])}; expected a mapping of keys to JSON schema")
    return next(iter(commands), {}), next(iter(keys), {})


def _is_named(answer: object) -> bool:
    return isinstance(answer, Mapping) and all(isinstance(name, str) for name in answer)
