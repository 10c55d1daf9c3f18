"""A method's settings in a YAML or JSON file."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tunerkit.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``2e-3`` is a number, as in YAML 1.2 and JSON, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        pairs = [(self.construct_object(key, deep=True), None) for key, _ in node.value]
        _once(pairs)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The counterpart, which puts the text "2e-3" into quotes."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_settings(path: Path) -> dict[str, object]:
    """The mapping in ``path`` (.yaml, .yml or .json); `tunerkit.structure` makes it a config.

    Raises `ConfigError`: no such file, not that format, not a mapping, a key given twice.
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
        return {}  # a YAML file with nothing but comments: all defaults
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError([f"{path}: expected a mapping of setting to value, got {type(found).__name__}"])
    return found


def write_settings(settings: dict[str, object]) -> str:
    """YAML text that `read_settings` reads back to the same mapping."""
    # Not allow_unicode: it would leave U+0085 as it is, which YAML reads as a line break.
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"given twice: {', '.join(twice)}")
    return dict(pairs)
