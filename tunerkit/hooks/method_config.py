"""Build a method's config from what the user passed: a mapping, a config or nothing."""

from collections.abc import Mapping

from tunerkit.config import AdapterConfig, from_mapping
from tunerkit.errors import ConfigError
from tunerkit.hooks.registry import registry


def structure(method: str, mapping: Mapping[str, object]) -> AdapterConfig:
    """Build a method's config from a mapping. Nothing is guessed, so a string is never read as a number.

    Args:
        method: The method's name.
        mapping: Settings by name, such as parsed YAML or JSON. Missing settings keep their defaults.

    Returns:
        An instance of the method's config class.

    Raises:
        ConfigError: The mapping is invalid; the error lists every problem with its path.
        UnknownMethodError: No installed plugin provides the method.
    """
    config: AdapterConfig = from_mapping(registry.get(method).config, mapping)
    return config


def configure(method: str, config: object) -> AdapterConfig:
    """Convert what the user passed as config (an object, a mapping or None) to the method's config class."""
    if config is None or isinstance(config, Mapping):
        return structure(method, config or {})
    expected = registry.get(method).config
    if isinstance(config, AdapterConfig) and isinstance(config, expected):
        return config
    takes, got = f"method {method!r} takes {expected.__name__}, a mapping or None", type(config)
    # Another library may have a class of the same name.
    which = f" of {got.__module__}, not of {expected.__module__}" if got.__name__ == expected.__name__ else ""
    raise ConfigError([f"{takes}, got {got.__name__}{which} @ $"])
