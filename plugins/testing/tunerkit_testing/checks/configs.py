"""Checks of a method's config."""

import json
from collections.abc import Iterator
from contextlib import suppress

import attrs

import tunerkit
from tunerkit import hooks
from tunerkit.errors import ConfigError
from tunerkit.plugin import AdapterConfig
from tunerkit_testing.cases import Trial


def check_config_round_trip(trial: Trial) -> None:
    """A config that was written as JSON and read again is equal, also with its defaults resolved.

    A config whose defaults are resolved is settled: `settled()` returns it as it is.
    """
    built = trial.structured()
    assert_survives_json(trial.method, built)
    settled = built.settled()
    again = settled.settled()
    assert again == settled, (
        f"settled() is not idempotent: called on what it returned, it changes {_differing(settled, again)}; files hold "
        "settled configs, and settle them again when they are loaded: return what is resolved already as it is"
    )
    assert_survives_json(trial.method, settled)


def assert_survives_json(method: str, config: AdapterConfig) -> None:
    """Assert that a config is equal once it was unstructured, written as JSON, read and structured again."""
    text = json.dumps(tunerkit.unstructure(config), allow_nan=False)
    again = tunerkit.structure(method, json.loads(text))
    assert again == config, (
        f"the config is another one after a round trip through JSON, which changes {_differing(config, again)}; let "
        "the converter of a field return what it was given, if that is converted already"
    )


def _differing(one: AdapterConfig, other: AdapterConfig) -> str:
    fields = [field.name for field in attrs.fields(type(one)) if getattr(one, field.name) != getattr(other, field.name)]
    return ", ".join(f"{name} from {getattr(one, name)!r} to {getattr(other, name)!r}" for name in fields)


def check_bad_config_refused(trial: Trial) -> None:
    """An unknown setting, a value of a wrong type and one out of range are refused, and change no model."""
    good = trial.settings
    for name, value in _mistakes(trial.method):
        try:
            tunerkit.structure(trial.method, {**good, name: value})
        except ConfigError:
            continue
        raise AssertionError(f"setting {name}={value!r} was accepted; check it with setting(..., ge=...) or problems()")
    model = trial.build()
    before = list(model.state_dict())
    with suppress(ConfigError):
        tunerkit.wrap(model, trial.method, {**good, "no_such_setting": 1})
    assert list(model.state_dict()) == before, (
        "a refused config left something in the model; change no model in a config"
    )


def _mistakes(method: str) -> Iterator[tuple[str, object]]:
    """Yield settings that no config may accept: unknown, of no supported type, and just out of each range."""
    yield "no_such_setting", 1
    for field in attrs.fields(hooks.registry.get(method).config):
        if not field.init:
            continue
        yield field.name, 1j  # no annotation of a config allows complex numbers
        if field.type in (int, float):
            limits = {name: field.metadata.get(name) for name in ("ge", "gt", "le", "lt")}
            yield from ((field.name, limit - 1) for name in ("ge", "gt") if (limit := limits[name]) is not None)
            yield from ((field.name, limit + 1) for name in ("le", "lt") if (limit := limits[name]) is not None)
