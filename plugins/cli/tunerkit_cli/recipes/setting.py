"""Put values that are given on the command line into a recipe's mapping: flags, and ``--set key=value``."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Final

import attrs

from tunerkit.errors import ConfigError, closest, shown
from tunerkit_cli.recipes.reading import key_for, schema
from tunerkit_cli.recipes.recipe import default_method
from tunerkit_cli.recipes.schema import Schema
from tunerkit_cli.recipes.trainer_arguments import argument_types, text_alone
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
_SECTIONS: Final = ("training", "config")
_EXAMPLE: Final = "expected key=value, as in --set learning_rate=1e-3"
Fields = Mapping[str, "attrs.Attribute[Any]"]


def merge(mapping: Mapping[str, Any], flags: Mapping[str, object]) -> dict[str, Any]:
    """Return a recipe's mapping with the values of flags, by the names in `FLAGS`."""
    merged = copy.deepcopy(dict(mapping))
    for flag, given in flags.items():
        value = given_settings(str(given)) if flag == "config" else given
        _place(merged, FLAGS[flag].split("."), value, f"--{flag.replace('_', '-')}")
    return merged


def from_command_line(mapping: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's mapping with settings as ``--set`` takes them. Raises `ConfigError` with all problems."""
    changed, types = copy.deepcopy(dict(mapping)), argument_types(_given("task", mapping, settings))
    names = _Names(schema()["properties"], types, cache(partial(_method_settings, mapping, settings)))
    problems: list[str] = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        try:
            if not equals or not all(key.split(".")) or len(key.split(".")) > DEEPEST:
                raise ConfigError([f"--set {shown(setting)}: {_EXAMPLE}"])
            path, wanted = _place_of(key, names)
            _place(changed, path, _value(text, key, wanted), f"--set {key}")
        except ConfigError as problem:
            problems += problem.problems
    if problems:
        raise ConfigError(problems)
    return changed


@attrs.frozen
class _Names:
    """The names that a key may begin with: those of the recipe, and those in its two sections."""

    keys: Mapping[str, Schema]
    training: Mapping[str, str]
    config: Callable[[], Fields]

    def within(self, section: str) -> Mapping[str, object]:
        """The names in ``training`` or ``config``, with their annotations."""
        if section == "training":
            return self.training
        return {name: field.type for name, field in self.config().items()}


def _value(text: str, key: str, wanted: Schema) -> object:
    try:
        value = given_value(text, f"--set {key}", wanted)
    except ConfigError as problem:
        quoted = "; if it is text, put it in quotes"
        lines = [line if "in quotes" in line else f"{line}{quoted}" for line in problem.problems]
        raise ConfigError(lines) from problem
    if value is None and text.strip().lower() not in ("null", "~"):  # an empty variable of the shell, or a YAML comment
        do = f"write {key}=null for no value, or put the value in quotes"
        raise ConfigError([f"--set {shown(f'{key}={text}')}: {_EXAMPLE}; {do}"])
    return value


def _place_of(key: str, names: _Names) -> tuple[list[str], Schema]:
    """Return where in the recipe a key stands, and the JSON schema of its value, as far as it is known."""
    first, *rest = key.split(".")
    if first in _SECTIONS and rest:
        known = names.within(first)
        if rest[0] not in known:
            raise _unknown(key, rest[0], known, names, f" in {first!r}")
        return [first, *rest], text_alone(known[rest[0]]) if len(rest) == 1 else {}
    if first in names.keys:
        found: Any = names.keys[first]
        for _ in rest:  # only in mappings whose values are all alike, such as `columns`
            found = found.get("additionalProperties")
            found = found if isinstance(found, Mapping) else {}
        return [first, *rest], found
    if rest:
        raise _unknown(key, first, names.keys, names)
    sections = [section for section in _SECTIONS if first in names.within(section)]
    if len(sections) > 1:
        forms = " or ".join(f"{section}.{first}" for section in sections)
        raise ConfigError([f"--set {key}: the trainer and the method both have {first!r}; write {forms}"])
    if not sections:
        raise _unknown(key, first, {*names.keys, *names.training, *names.config()}, names)
    return _place_of(f"{sections[0]}.{first}", names)


def _unknown(key: str, name: str, close: Iterable[str], names: _Names, where: str = "") -> ConfigError:
    """Return the error for a key without a name such as ``name``, which may be known elsewhere, or close to some."""
    full = key_for(name) or ""
    section, _, setting = full.partition(".")
    full = "" if section == "config" and setting not in names.config() else full
    hint = f"; did you mean {full!r}?" if full else closest(name, sorted(close)) if close is names.training else ""
    if not hint:  # which the method may have
        from tunerkit.config import meant  # imports torch

        known = f"; did you mean 'config.{name}'?" if name in names.config() else ""
        hint = known or meant(name, names.config().values()) or closest(name, sorted(close))
    hint = hint or "; `tunerkit schema` lists a recipe's keys, `tunerkit config` a method's"
    return ConfigError([f"--set {shown(key)[1:-1]}: there is no key {shown(name)}{where}{hint}"])


def _method_settings(mapping: Mapping[str, Any], settings: Iterable[str]) -> Fields:
    """The method's settings by name; of any installed method's if an adapter decides it."""
    from tunerkit import hooks  # imports torch

    method = _given("method", mapping, settings)
    method = method if isinstance(method, str) else None  # another value is refused later
    if method is None and _given("from_adapter", mapping, settings) is not None:
        methods = [each for each, info in hooks.registry.methods().items() if info.error is None]
    else:
        methods = [method or default_method(has_data=_given("data", mapping, settings) is not None)]
    configs = [hooks.registry.get(hooks.registry.named(each)).config for each in methods]
    return {field.name: field for each in configs for field in attrs.fields(each)}


def _given(key: str, mapping: Mapping[str, Any], settings: Iterable[str]) -> Any:
    values = [text.partition("=")[2].strip() for text in settings if text.partition("=")[0].strip() == key]
    return values[-1] if values else mapping.get(key)


def _place(mapping: dict[str, Any], path: list[str], value: object, where: str) -> None:
    """Set the value at a path of keys, in place; mappings on the way are copied, as YAML's aliases share them."""
    for depth, name in enumerate(path[:-1]):
        inner = {} if mapping.get(name) is None else mapping[name]
        if not isinstance(inner, dict):
            whole = ".".join(path[: depth + 1])
            raise ConfigError([f"{where}: {whole} is {shown(inner)}, which has no keys; set {whole} itself"])
        mapping[name] = dict(inner)
        mapping = mapping[name]
    mapping[path[-1]] = value
