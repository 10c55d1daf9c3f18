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
_EXAMPLE: Final = "expected key=value, as in --set learning_rate=1e-3"
# The names in a section: arguments with their annotations, or a method's fields.
_Sections = Mapping[str, Callable[[], Mapping[str, Any]]]


def merge(mapping: Mapping[str, Any], flags: Mapping[str, object]) -> dict[str, Any]:
    """Return a recipe's mapping with the values of flags, by the names in `FLAGS`."""
    merged = copy.deepcopy(dict(mapping))
    for flag, given in flags.items():
        value = given_settings(str(given)) if flag == "config" else given
        _place(merged, FLAGS[flag].split("."), value, f"--{flag.replace('_', '-')}")
    return merged


def from_command_line(mapping: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's mapping with settings as ``--set`` takes them. Raises `ConfigError` with all problems."""
    changed, keys = copy.deepcopy(dict(mapping)), schema()["properties"]
    sections: _Sections = {
        "training": cache(partial(argument_types, _given("task", mapping, settings))),
        "config": cache(partial(_method_settings, mapping, settings)),  # imports torch
    }
    problems: list[str] = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        try:
            if not equals or not all(key.split(".")) or len(key.split(".")) > DEEPEST:
                raise ConfigError([f"--set {shown(setting)}: {_EXAMPLE}"])
            path, wanted = _place_of(key, keys, sections)
            _place(changed, path, _value(text, key, wanted), f"--set {key}")
        except ConfigError as problem:
            problems += problem.problems
    if problems:
        raise ConfigError(problems)
    return changed


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


def _place_of(key: str, keys: Mapping[str, Schema], sections: _Sections) -> tuple[list[str], Schema]:
    """Return where in the recipe a key stands, and the JSON schema of its value, as far as it is known."""
    first, *rest = key.split(".")
    if first in sections and rest:
        known = sections[first]()
        if rest[0] not in known:
            raise _unknown(key, rest[0], known, sections, f" in {first!r}")
        annotation = getattr(known[rest[0]], "type", known[rest[0]])
        return [first, *rest], text_alone(annotation) if len(rest) == 1 else {}
    if first in keys:
        found: Any = keys[first]
        for _ in rest:  # only in mappings whose values are all alike, such as `columns`
            found = found.get("additionalProperties")
            found = found if isinstance(found, Mapping) else {}
        return [first, *rest], found
    if rest:
        raise _unknown(key, first, keys, sections)
    having = [section for section, names in sections.items() if first in names()]
    if len(having) > 1:
        forms = " or ".join(f"{section}.{first}" for section in having)
        raise ConfigError([f"--set {key}: the trainer and the method both have {first!r}; write {forms}"])
    if not having:
        raise _unknown(key, first, {*keys, *(name for names in sections.values() for name in names())}, sections)
    return _place_of(f"{having[0]}.{first}", keys, sections)


def _unknown(key: str, name: str, close: Iterable[str], sections: _Sections, where: str = "") -> ConfigError:
    """Return the error for a key without a name such as ``name``, which may be known elsewhere, or close to some."""
    full = key_for(name) or ""
    section, _, setting = full.partition(".")
    full = "" if section == "config" and setting not in sections["config"]() else full
    in_training = closest(name, sorted(close)) if close is sections["training"]() else ""
    hint = f"; did you mean {full!r}?" if full else in_training
    if not hint:  # which the method may have
        from tunerkit.config import meant  # imports torch

        fields = sections["config"]()
        known = f"; did you mean 'config.{name}'?" if name in fields else ""
        hint = known or meant(name, fields.values()) or closest(name, sorted(close))
    hint = hint or "; `tunerkit schema` lists a recipe's keys, `tunerkit config` a method's"
    return ConfigError([f"--set {shown(key)[1:-1]}: there is no key {shown(name)}{where}{hint}"])


def _method_settings(mapping: Mapping[str, Any], settings: Iterable[str]) -> Mapping[str, "attrs.Attribute[Any]"]:
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
