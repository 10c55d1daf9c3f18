"""Settings in a YAML or JSON file, or on the command line."""

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from tunerkit.errors import ConfigError, shown
from tunerkit.paths import few
from tunerkit_transformers.run_folder import irregular

# A method has a few dozen settings. Reading 100 kB of YAML takes about a second.
_MAX_BYTES = 100_000
_MAX_VALUES = 10_000
DEEPEST = 10  # levels of mappings and lists
_LONGEST_NUMBER = 250  # characters of a whole number, in hexadecimal too: floats end at 309 digits
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_NUMBERS: Final = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_PLAIN: Final = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp", *_NUMBERS}
_ANYTHING: Final[Mapping[str, Any]] = {}  # JSON schema that says nothing of a value


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``2e-3`` as a number, as YAML 1.2 and JSON do, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            _once([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The matching writer, which quotes the text "2e-3"."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def given_settings(given: str) -> dict[str, object]:
    """Read a mapping from the command line, written out or a file's path. Raises `ConfigError` as `read_settings`."""
    if not given.lstrip().startswith("{"):
        return read_settings(Path(given))
    return _mapping(given_value(given, "--config"), "--config")


def given_value(given: str, name: str, schema: Mapping[str, Any] = _ANYTHING, suffix: str = ".yaml") -> Any:
    """Read one value on the command line as YAML. ``name`` is for errors, and ``schema`` is as for `read_settings`."""
    if len(given) > _MAX_BYTES:
        raise ConfigError([f"{name}: has {len(given)} characters; use at most {_MAX_BYTES}, or a file"])
    try:
        if suffix == ".json":
            found = json.loads(given, object_pairs_hook=_once, parse_int=lambda text: int(_of_allowed_length(text)))
        else:
            found = _from_yaml(given, schema)
    except RecursionError as problem:
        raise ConfigError([f"{name}: is nested too deeply; settings have at most {DEEPEST} levels"]) from problem
    except Exception as problem:  # for some text the YAML library raises KeyError, IndexError or AttributeError
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise ConfigError([f"{name}: cannot be read as {suffix}: {reason}"]) from problem
    for number, depth in enumerate(_depths(found)):
        if depth > DEEPEST:
            reason = f"is nested deeper than {DEEPEST} levels, or a YAML anchor contains itself"
            raise ConfigError([f"{name}: {reason}; write the values out"])
        if number >= _MAX_VALUES:
            raise ConfigError([f"{name}: has more than {_MAX_VALUES} values, with YAML aliases written out; use fewer"])
    return found


def read_settings(path: Path, schema: Mapping[str, Any] = _ANYTHING) -> dict[str, object]:
    """Read the mapping in ``path`` (.yaml, .yml or .json). Raises `ConfigError`, also if it takes seconds to read.

    ``schema`` is the JSON schema of the mapping, as far as it is known; that of a key may be a function, which is
    called where the key has a value. Where it takes text and no number or boolean, ``no``, ``010`` and ``2024`` are
    texts. Numbers that YAML 1.1 and 1.2 read differently are refused: ``010`` is octal, and ``1:30`` is to base 60.
    """
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError([f"{path}: settings files end in .yaml, .yml or .json, got {path.suffix or 'no ending'!r}"])
    if (what := irregular(path)) is not None:
        raise ConfigError([f"{path}: is {what}, not a file; write the settings into a file, and pass that"])
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"settings files have at most {_MAX_BYTES} bytes; is it the right file?")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except UnicodeDecodeError as problem:
        raise ConfigError([f"{path}: byte {problem.start} is not UTF-8; save the file as UTF-8"]) from problem
    except (OSError, ValueError) as problem:
        raise ConfigError([f"{path}: cannot be read as {suffix}: {' '.join(str(problem).split())}"]) from problem
    return _mapping(given_value(text, str(path), schema, suffix), str(path))


def _mapping(found: Any, name: str) -> dict[str, object]:
    if found is None:
        return {}  # a YAML file with only comments: all defaults
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(
            [f"{name}: expected a mapping of settings to values, got {type(found).__name__} {shown(found)}"]
        )
    return found


def _from_yaml(text: str, schema: Mapping[str, Any]) -> Any:
    loader = _Loader(text)
    root = loader.get_single_node()
    if root is None:
        return None
    _settle_(root, schema, set())
    return loader.construct_document(root)


def _settle_(node: yaml.Node, schema: Mapping[str, Any], seen: set[int]) -> None:
    """Let words be texts where the schema takes text alone, and refuse numbers that another YAML reads differently."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, value in node.value:
            _settle_(key, _ANYTHING, seen)
            found = known.get(key.value, others) if isinstance(key, yaml.ScalarNode) else None
            found = found() if callable(found) and value.value else found
            _settle_(value, found if isinstance(found, Mapping) else _ANYTHING, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _settle_(value, schema.get("items", _ANYTHING), seen)
    elif isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN and node.style is None and is_text(schema):
        node.tag = "tag:yaml.org,2002:str"
    elif node.tag in _NUMBERS:
        if node.tag.endswith("int"):
            _of_allowed_length(node.value)
        other = "a text" if ":" in node.value else "decimal" if _OCTAL.fullmatch(node.value) else None
        if other is not None:
            base = "a number to base 60" if ":" in node.value else "octal"
            raise ValueError(
                f"line {node.start_mark.line + 1}: {shown(node.value)[1:-1]} is {base} in YAML 1.1 and {other} in YAML "
                "1.2; write the decimal number that is meant, or put a text in quotes"
            )


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether the only plain values that a JSON schema allows are texts."""
    kinds = schema.get("type", ())
    return kinds == "string" or ("string" in kinds and {"boolean", "integer", "number"}.isdisjoint(kinds))


def _depths(value: object, depth: int = 0) -> Iterator[int]:
    """Yield the depth of each value, aliases written out. An anchor that contains itself has no end, so stop early."""
    yield depth
    if isinstance(value, dict | list | tuple | set) and depth <= DEEPEST:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _depths(inner, depth + 1)


def write_settings(settings: dict[str, object]) -> str:
    """YAML text that `read_settings` reads back to the same mapping."""
    # Without allow_unicode: it would write U+0085 unescaped, which YAML reads as a line break.
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False)


def _of_allowed_length(number: str) -> str:
    if len(number) > _LONGEST_NUMBER:
        raise ValueError(f"a whole number of {len(number):,} characters; use at most {_LONGEST_NUMBER}")
    return number


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    for key, _ in pairs:
        if not isinstance(key, Hashable):
            raise ValueError(f"a {type(key).__name__} as a key: {shown(key)}; keys are the names of settings")
    twice = sorted({str(key) for key, times in Counter(key for key, _ in pairs).items() if times > 1})
    if twice:
        raise ValueError(f"given twice: {few(twice, shown=5)}")
    return dict(pairs)
