"""A method's settings in a YAML or JSON file."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tunerkit import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``2e-3`` as a number, as YAML 1.2 and JSON do, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        pairs = [(self.construct_object(key, deep=True), None) for key, _ in node.value]
        _once(pairs)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The matching writer, which quotes the text "2e-3"."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_settings(path: Path) -> dict[str, object]:
    """Read the mapping in ``path`` (.yaml, .yml or .json); `tunerkit.structure` converts it to a config.

    Raises `ConfigError` if there is no such file, or if it is malformed, is not a mapping or has a duplicate key.
    """
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError([f"{path}: settings files end in .yaml, .yml or .json, got {path.suffix or 'no ending'!r}"])
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_once) if suffix == ".json" else yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise ConfigError([f"{path}: cannot be read as {suffix}: {' '.join(str(problem).split())}"]) from problem
    if found is None:
        return {}  # a YAML file with only comments: all defaults
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError([f"{path}: expected a mapping of settings to values, got {type(found).__name__}"])
    return found


def write_settings(settings: dict[str, object]) -> str:
    """YAML text that `read_settings` reads back to the same mapping."""
    # Without allow_unicode: it would write U+0085 unescaped, which YAML reads as a line break.
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"given twice: {', '.join(twice)}")
    return dict(pairs)
