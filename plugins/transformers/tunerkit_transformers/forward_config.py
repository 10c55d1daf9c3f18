"""The settings of a base model that change its output but not its weights."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tunerkit.plugin.trainers import base_modules
from tunerkit_transformers.forward_fields import FORWARD_ALIASES, FORWARD_FIELDS, FORWARD_SYNONYMS

_DEEPEST = 4  # configs inside configs: a multi-modal model has two or three levels


def forward_config(model: nn.Module) -> dict[str, Any]:
    """Return the settings by dotted name, such as ``text_config.rms_norm_eps``; empty without a known config.

    Args:
        model: The model. If it has no config itself, the configs of its outermost modules with one are read, and each
            name begins with the module's path.
    """
    found: dict[str, Any] = {}
    owner: str | None = None  # the last module with a config; the modules inside it follow
    for path, module in base_modules(model):
        if owner == "":
            break
        if owner is None or not path.startswith(f"{owner}."):
            match module:
                case nn.Module(config=object(model_type=str(kind), __dict__=dict(fields))):
                    owner = path
                    settings = _settings({"model_type": kind, **fields}, _DEEPEST)
                    found.update((_join(path, name), value) for name, value in settings)
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _settings(config: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        match value:
            case object(model_type=str(kind), __dict__=dict(fields)) if depth:
                inner = _settings({"model_type": kind, **fields}, depth - 1)
                yield from ((_join(name, field), found) for field, found in inner)
            case _ if name in FORWARD_FIELDS:
                yield from _flat(name, value)


def _flat(name: str, value: object) -> Iterator[tuple[str, Any]]:
    """Yield (name, plain value); dicts are flattened, since releases nest the same settings differently."""
    name = FORWARD_ALIASES.get(name, name)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(_join(name, str(key)), inner)
    elif value is not None:  # None stands for a default, which a later release may write out
        yield name, _plain(value)


def _plain(value: object) -> Any:
    """Convert a value to one that JSON restores exactly."""
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    if isinstance(value, str):
        return FORWARD_SYNONYMS.get(value, value)
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
