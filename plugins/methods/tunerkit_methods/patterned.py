"""Configs in which some settings have other values at some targets, as PEFT's patterns say them."""

from collections.abc import Iterable
from typing import Any

import attrs

from tunerkit.plugin import AdapterConfig, lookup

_END = "_pattern"


@attrs.frozen
class PatternedConfig(AdapterConfig):
    """Abstract. A config with a setting ``rank_pattern`` beside ``rank``, say: it maps target patterns to ranks."""

    def at(self, path: str, name: str) -> Any:
        """Return the value of a setting at a target: that of the first pattern that matches its path."""
        return lookup(getattr(self, name + _END), path, getattr(self, name))

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        tables = [field.name for field in attrs.fields(type(self)) if field.name.endswith(_END)]
        return ((pattern, name) for name in tables for pattern in getattr(self, name))
