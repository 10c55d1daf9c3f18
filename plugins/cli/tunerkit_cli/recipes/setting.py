"""Put values that are given on the command line into a recipe's mapping: flags, and ``--set key=value``."""

import copy
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePath
from typing import Any, Final

import attrs

from tunerkit.errors import ConfigError, closest, shown
from tunerkit_cli.recipes.fragments import Fragment
from tunerkit_cli.recipes.reading import schema
from tunerkit_cli.settings import DEEPEST, given_settings, given_value

# For each flag of `tunerkit train`, the key that it sets.
FLAGS: Final[Mapping[str, str]] = {
    **{name: name for name in ("task", "method", "model", "data", "eval_data", "config", "out")},
    "from": "from_adapter",
    "epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "seed": "training.seed",
    **{name: name for name in ("max_length", "precision", "baseline")},
    "text_column": "columns.text",
    "label_column": "columns.label",
}
_EXAMPLE: Final = "expected key=value, as in --set learning_rate=1e-3"
Names = Mapping[str, Collection[str]]  # the keys of each section; those of the method come with their fields


def merge(mapping: Mapping[str, Any], flags: Mapping[str, object]) -> dict[str, Any]:
    """Return a recipe's mapping with the values of flags, by the names in `FLAGS`, which replace its own.

    None means that a flag was not given. ``config`` is a mapping, a mapping written out, or the path of a file. Raises
    `ConfigError` if it cannot be read, or if the recipe has a plain value where a flag needs a mapping.
    """
    merged = copy.deepcopy(dict(mapping))
    for flag, given in flags.items():
        value = str(given) if isinstance(given, PurePath) else copy.deepcopy(given)
        if flag == "config" and isinstance(value, str):
            value = given_settings(value)
        if value is not None:
            _place(merged, FLAGS[flag].split("."), value, f"--{flag.replace('_', '-')}")
    return merged


def apply(
    mapping: Mapping[str, Any],
    settings: Iterable[str],
    trainer_arguments: Collection[str],
    method_settings: Mapping[str, "attrs.Attribute[Any]"],
    plugin_keys: Mapping[str, Fragment] | None = None,
) -> dict[str, Any]:
    """Return a recipe's mapping with settings as ``--set`` takes them; of two with the same key, the later one wins.

    Each is ``key=value``, and the value is YAML. The key is one of the recipe, one of ``trainer_arguments`` or one of
    ``method_settings``. With its section before it, as in ``config.rank``, it is never ambiguous. Raises `ConfigError`
    for all settings that are malformed, whose key is unknown or ambiguous, or whose value is not YAML.
    """
    changed = copy.deepcopy(dict(mapping))
    recipe_keys = (*schema(plugin_keys)["properties"],)
    names: Names = {"": recipe_keys, "training": trainer_arguments, "config": method_settings}
    problems: list[str] = []
    for setting in settings:
        try:
            key, value = _parsed(setting)
            _place(changed, _path(key, names), value, f"--set {key}")
        except ConfigError as problem:
            problems += problem.problems
    if problems:
        raise ConfigError(problems)
    return changed


def _parsed(setting: str) -> tuple[str, object]:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")) or len(key.split(".")) > DEEPEST:
        raise ConfigError([f"--set {shown(setting)}: {_EXAMPLE}"])
    try:
        value = given_value(text, f"--set {key}")
    except ConfigError as problem:
        quoted = "; if it is text, put it in quotes"
        lines = [line if "in quotes" in line else f"{line}{quoted}" for line in problem.problems]
        raise ConfigError(lines) from problem
    if value is None and text.strip().lower() not in ("null", "~"):  # an empty variable of the shell, or a YAML comment
        raise ConfigError(
            [f"--set {shown(setting)}: {_EXAMPLE}; write {key}=null for no value, or put the value in quotes"]
        )
    return key, value


def _path(key: str, names: Names) -> list[str]:
    """Return where in the recipe a key stands, from the names in each section; "" is the recipe's own section."""
    first, *rest = key.split(".")
    sections = [section for section in names if section and first in names[section]]
    if rest and first in names and rest[0] not in names[first]:
        raise _unknown(key, rest[0], names[first], names, f" in {first!r}")
    if first in names[""]:
        return [first, *rest]
    if rest:
        raise _unknown(key, first, names[""], names)
    if not sections:
        raise _unknown(key, first, {name for section in names.values() for name in section}, names)
    if len(sections) > 1:
        forms = " or ".join(f"{section}.{first}" for section in sections)
        raise ConfigError([f"--set {key}: the trainer and the method both have {first!r}; write {forms}"])
    return [*sections, first]


def _unknown(key: str, name: str, close: Iterable[str], names: Names, where: str = "") -> ConfigError:
    """Return the error for a key without a name such as ``name``.

    It may stand in another section, be a name that another library has for a setting, or be close to some.
    """
    full = [FLAGS[name]] if name in FLAGS else [f"{part}.{name}" for part in names if part and name in names[part]]
    settings = names["config"]
    from tunerkit.config import meant  # imports torch, which an error on the command line does not need

    elsewhere = meant(name, settings.values()) if isinstance(settings, Mapping) else ""
    hint = f"; did you mean {' or '.join(map(repr, full))}?" if full else elsewhere or closest(name, sorted(close))
    hint = hint or "; `tunerkit schema` lists a recipe's keys, `tunerkit config` a method's"
    return ConfigError([f"--set {shown(key)[1:-1]}: there is no key {shown(name)}{where}{hint}"])


def _place(mapping: dict[str, Any], path: list[str], value: object, where: str) -> None:
    """Set the value at a path of keys in nested mappings, in place. Missing mappings are made.

    Mappings on the way are copied: with YAML's aliases, one mapping may stand in several places.
    """
    for depth, name in enumerate(path[:-1]):
        inner = {} if mapping.get(name) is None else mapping[name]
        if not isinstance(inner, dict):
            whole = ".".join(path[: depth + 1])
            raise ConfigError([f"{where}: {whole} is {shown(inner)}, which has no keys; set {whole} itself"])
        mapping[name] = dict(inner)
        mapping = mapping[name]
    mapping[path[-1]] = value
