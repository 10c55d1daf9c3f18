"""The JSON schema of recipes, with the keys of the installed plugins: it completes and checks a recipe in an editor."""

import copy
from collections.abc import Mapping
from typing import Any

import attrs

from tunerkit_cli.plugin_commands import plugin_commands
from tunerkit_cli.recipes.fragments import Fragment
from tunerkit_cli.recipes.recipe import Recipe


def schema(plugin_keys: Mapping[str, Fragment] | None = None) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) that a recipe conforms to, as plain values.

    Args:
        plugin_keys: The further keys and their fragments; by default those that the installed plugins declare.
    """
    declared = plugin_commands().recipe_keys if plugin_keys is None else plugin_keys
    own = {field.name: _fragment(field) for field in attrs.fields(Recipe) if field.metadata}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of tunerkit",
        "description": "Arguments of the trainer stand in `training`, and the method's settings in `config`. "
        "Plugins may add keys.",
        "type": "object",
        "properties": {name: _or_null(fragment) for name, fragment in {**own, **declared}.items()},
        "additionalProperties": False,
    }


def _fragment(field: "attrs.Attribute[Any]") -> Fragment:
    default = {} if isinstance(field.default, attrs.Factory) else field.default  # type: ignore[arg-type]  # a class
    return {**field.metadata, **({} if default is None else {"default": default})}


def _or_null(fragment: Fragment) -> dict[str, Any]:
    """Return a copy that also allows a key without a value, which means the default."""
    widened = copy.deepcopy(dict(fragment))
    if "type" in widened:
        kinds = widened["type"]
        widened["type"] = list(dict.fromkeys([*([kinds] if isinstance(kinds, str) else kinds), "null"]))
    if "enum" in widened:
        widened["enum"] = [*widened["enum"], *([] if None in widened["enum"] else [None])]
    return widened
