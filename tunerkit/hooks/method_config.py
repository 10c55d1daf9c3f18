"""The config of a method by the method's name: from a mapping, to a mapping, and from what a user passed."""

from collections.abc import Mapping

from tunerkit.config import AdapterConfig, from_mapping, to_mapping
from tunerkit.errors import ConfigError
from tunerkit.hooks.registry import registry


def structure(method: str, mapping: Mapping[str, object]) -> AdapterConfig:
    """The config of ``method`` from a mapping (parsed YAML or JSON), strictly; `ConfigError` names every problem."""
    config: AdapterConfig = from_mapping(registry.get(method).config, mapping)
    return config


def unstructure(config: AdapterConfig) -> dict[str, object]:
    """A config as a mapping that JSON and YAML can hold; `structure` gives the equal config back."""
    return to_mapping(config)


def configure(method: str, config: object) -> AdapterConfig:
    """Whatever the user gave as config, as the method's own class."""
    expected = registry.get(method).config
    if config is None:
        config = {}
    if isinstance(config, Mapping):
        return structure(method, config)
    if not isinstance(config, expected) or not isinstance(config, AdapterConfig):
        raise ConfigError(
            [f"method {method!r} takes {expected.__name__}, a mapping or None, got {type(config).__name__} @ $"]
        )
    return config
