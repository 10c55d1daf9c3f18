"""What plugins add to the command: commands, and keys of recipes."""

import re
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import attrs
import pluggy

from tunerkit.errors import cut, shown
from tunerkit_cli.recipes.fragments import Fragment, objection
from tunerkit_cli.recipes.recipe import Recipe

# Apart from the group of methods: `tunerkit --help` imports these modules, and a method's module imports torch.
GROUP = "tunerkit.commands"


hookspec = pluggy.HookspecMarker("tunerkit")


class CommandSpecs:
    """The hooks that a module in the entry-point group ``tunerkit.commands`` implements, one of them or both."""

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

    @hookspec
    def tunerkit_recipe_keys(self) -> Mapping[str, Fragment]:  # type: ignore[empty-body]
        """Add top-level keys to recipes. Their values arrive in ``Recipe.extra``.

        Returns:
            For each key, such as ``"acme"``, a dict with its JSON schema. A recipe is checked against it, and
            `tunerkit schema` prints it. It has a ``description``, and may have ``type``, ``default``, ``examples``,
            ``enum``, ``minimum``, ``maximum``, ``minLength``, ``items``, ``properties`` and ``additionalProperties``.
        """


@attrs.frozen
class PluginCommands:
    """The commands of all plugins by name, what is wrong with plugins (one sentence each), and their recipe keys."""

    commands: Mapping[str, Callable[..., object]]
    problems: tuple[str, ...]
    recipe_keys: Mapping[str, Fragment] = attrs.field(factory=dict)


def plugin_commands(found: Iterable[EntryPoint] | None = None) -> PluginCommands:
    """Import the modules of all plugins that extend the command, and ask them. No exception of a plugin passes.

    No plugin replaces the command's own commands.

    Args:
        found: The entry points; by default those of the installed distributions.
    """
    from tunerkit_cli.commands import COMMANDS  # which import this module

    commands: dict[str, Callable[..., object]] = {}
    keys: dict[str, Fragment] = {}
    problems: list[str] = []
    points = entry_points(group=GROUP) if found is None else found
    for point in sorted(points, key=lambda point: (point.dist.name if point.dist else "", point.name)):
        owner = point.dist.name if point.dist else point.value
        try:
            added, declared = _ask(point)
            objections = {name: _objection(name, fragment, keys) for name, fragment in declared.items()}
        except Exception as problem:  # a plugin's own; the other commands must go on working
            text = cut(" ".join(str(problem).split()) or type(problem).__name__, 300)
            problems.append(f"the commands of {owner} cannot be loaded: {text}")
            continue
        for name, command in added.items():
            if name in COMMANDS or name in commands:
                problems.append(f"{owner}: there is a command {shown(name)} already; its author must rename it")
            else:
                commands[name] = command
        keys |= {name: fragment for name, fragment in declared.items() if objections[name] is None}
        problems += [
            f"{owner}: the recipe key {shown(name)} is left out: {reason}; its author must change it"
            for name, reason in objections.items()
            if reason is not None
        ]
    return PluginCommands(commands, tuple(problems), keys)


def _ask(point: EntryPoint) -> tuple[Mapping[str, Callable[..., object]], Mapping[str, Fragment]]:
    manager = pluggy.PluginManager("tunerkit")
    manager.add_hookspecs(CommandSpecs)
    module = point.load()
    manager.register(module)
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


def _objection(name: str, fragment: Fragment, others: Mapping[str, Fragment]) -> str | None:
    """Return why a recipe cannot have this key, or None."""
    if name in others or name in {field.name for field in attrs.fields(Recipe)}:
        return "there is a key of this name already"
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        return "a key has at most 40 letters from a to z, digits and '_', a letter first"
    return objection(fragment) or (None if fragment.get("description") else "it has no description")
