"""Read a recipe strictly: every mistake in it is named, all of them in one error."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tunerkit
from tunerkit import ConfigError
from tunerkit.errors import half_character, shown
from tunerkit_cli.plugin_commands import plugin_commands
from tunerkit_cli.recipes.fragments import Fragment, problems
from tunerkit_cli.recipes.recipe import VERSION, Recipe
from tunerkit_cli.recipes.schema import schema
from tunerkit_cli.settings import read_settings


def read_recipe(path: Path, plugin_keys: Mapping[str, Fragment] | None = None) -> Recipe:
    """Read a recipe from a YAML or JSON file.

    Args:
        path: The file.
        plugin_keys: The further keys and their fragments; by default those that the installed plugins declare.

    Returns:
        The recipe. A key without a value has its default.

    Raises:
        ConfigError: The file cannot be read, or the recipe has an unknown key, a value of another type, or another
            version.
    """
    return structure(read_settings(path), str(path), plugin_keys)


def structure(
    mapping: Mapping[str, Any], source: str = "the recipe", plugin_keys: Mapping[str, Fragment] | None = None
) -> Recipe:
    """Convert a mapping to a recipe. ``source`` names it in errors; the rest is as for `read_recipe`."""
    declared = plugin_commands().recipe_keys if plugin_keys is None else plugin_keys
    _raise_if(_version_problems(mapping), source)  # another version has other keys
    _raise_if(problems(dict(mapping), schema(declared)), source)
    _raise_if(_half_characters(mapping), source)
    given = {name: copy.deepcopy(value) for name, value in mapping.items() if value is not None}
    extra = {name: copy.deepcopy(each["default"]) for name, each in declared.items() if "default" in each}
    extra |= {name: given.pop(name) for name in declared if name in given}
    return Recipe(**given, extra=extra)


def _version_problems(mapping: Mapping[str, Any]) -> list[str]:
    version = mapping.get("version")
    if version is None or (version == VERSION and isinstance(version, int) and not isinstance(version, bool)):
        return []
    ours = f"tunerkit {tunerkit.__version__} reads version {VERSION}"
    if isinstance(version, int) and version > VERSION:
        do = "a later one reads this recipe: pip install --upgrade tunerkit, or start anew from `tunerkit init`"
    else:
        do = f"no recipe has another one yet; write version: {VERSION}, or start anew from `tunerkit init`"
    return [f"version: got {shown(version)}, and {ours}; {do}"]


def _half_characters(mapping: Mapping[str, Any]) -> Iterator[str]:
    """Texts and paths that no file of the run could state."""
    for name, value in mapping.items():
        if (problem := half_character(json.dumps(value, ensure_ascii=False, default=str))) is not None:
            yield f"{name}: {problem}"


def _raise_if(found: Iterable[str], source: str) -> None:
    lines = [f"{source}: {problem}" for problem in found]
    if lines:
        raise ConfigError(lines)
