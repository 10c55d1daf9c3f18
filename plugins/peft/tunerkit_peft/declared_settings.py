"""The settings of a type of PEFT's by the names that a method declares: read from PEFT's config, and written for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from tunerkit.errors import closest, shown
from tunerkit.plugin import ConfigError
from tunerkit_peft.declarations import COMMON, NONE, Declaration, Declared, Setting
from tunerkit_peft.settings import (
    HARMLESS,
    REFUSED,
    Common,
    Values,
    changed_base,
    common_of,
    is_number,
    refuse,
)

_ABSENT: Final = object()


@attrs.frozen
class TableSettings:
    """What the settings of such an adapter say.

    Attributes:
        common: What every adapter has.
        declared: The method, and its names.
        config: The settings of the method, but those that name targets.
        chosen: PEFT's values of the settings that name targets, by our names: ends of paths, or an expression.
        patterns: PEFT's patterns with their values, by our names of the settings that differ between targets.
        drawn: What is wrong with the settings if the file lacks a shared tensor, so that it would be drawn.
        remarks: What the settings say and the adapter will not hold.
    """

    common: Common
    declared: Declared
    config: Mapping[str, object]
    chosen: Mapping[str, tuple[str, ...] | str]
    patterns: Mapping[str, Mapping[str, Any]]
    drawn: tuple[str, ...]
    remarks: tuple[str, ...]


def read_table_settings(file: Path, found: Mapping[str, Any], declared: Declared) -> TableSettings:
    """Read and check the settings.

    Raises:
        FileError: A value is of a wrong type, is missing, or asks for something that the method does not compute. The
            error names every problem.
    """
    reader = Values(found)
    common = common_of(file, reader, declared.names.bias)
    converted = Converted()
    refuse(file, [*reader.problems, *converted.problems_of(found, declared)])
    own = (converted.config, converted.chosen, converted.patterns)
    drawn = tuple(_other_constants(found, declared, declared.names.drawn))
    return TableSettings(common, declared, *own, drawn, tuple(converted.remarks))


@attrs.define
class Converted:
    """PEFT's settings as those of a method, filled by `problems_of`."""

    config: dict[str, object] = attrs.field(factory=dict)
    chosen: dict[str, tuple[str, ...] | str] = attrs.field(factory=dict)
    patterns: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    remarks: list[str] = attrs.field(factory=list)

    def problems_of(self, found: Mapping[str, Any], declared: Declared) -> Iterator[str]:
        """Convert all settings, and yield what is wrong."""
        names = declared.names
        self.config |= {own: value for own, (value, _) in names.fixed.items()}
        for own, setting in names.settings.items():
            yield from self._setting(found, own, setting)
            if setting.pattern:
                yield from self._patterns(found.get(setting.pattern) or {}, own, setting)
        for own, setting in names.settings.items():
            if setting.instead_of:
                self._one_of(own, setting)
        yield from _other_constants(found, declared, names.constants)
        for name, value in names.training.items():
            given = found.get(name, value)
            if not _same(given, value) and (given or value):
                self.remarks.append(
                    f"{name!r} is {shown(given)}, which method {declared.method!r} does not have: the model computes "
                    f"the same, and training goes on with {shown(value)}"
                )
        yield from _unknown(found, declared)

    def _setting(self, found: Mapping[str, Any], own: str, setting: Setting) -> Iterator[str]:
        given = {name: found[name] for name in setting.name if name in found}
        if not given and setting.default is not NONE:
            given = {setting.name[0]: setting.default}
        if not given:
            yield f"{setting.name[0]!r} is missing"
            return
        first, value = next(iter(given.items()))
        for name, other in given.items():
            if not _same(other, value):
                yield f"{name!r} is {shown(other)}, and {first!r} is {shown(value)}; the method has one value for both"
                return
        if setting.targets:
            if isinstance(value, str) or (isinstance(value, list) and all(map(_is_name, value))):
                self.chosen[own] = value if isinstance(value, str) else tuple(value)
            else:
                yield f"{first!r} is {shown(value)}; expected a list of names, or a regular expression"
        elif setting.values:
            ours = [mine for mine, theirs in setting.values if any(_same(value, each) for each in theirs)]
            if ours:
                self.config[own] = ours[0]
            else:
                allowed = ", ".join(shown(each) for _, theirs in setting.values for each in theirs)
                yield f"{first!r} is {shown(value)}; the method computes what PEFT does with {allowed}"
        else:
            self.config[own] = None if setting.none is not NONE and _same(value, setting.none) else value

    def _patterns(self, table: Any, own: str, setting: Setting) -> Iterator[str]:
        if not isinstance(table, dict) or not all(map(is_number, table.values())):
            yield f"{setting.pattern!r} is {shown(table)}; expected an object that maps patterns to numbers"
        else:
            self.patterns[own] = table

    def _one_of(self, own: str, setting: Setting) -> None:
        """PEFT has 0 for the one of two settings that is not used."""
        for name in (own, setting.instead_of):
            if name in self.config and _same(self.config[name], 0):
                self.config[name] = None


def _other_constants(found: Mapping[str, Any], declared: Declared, constants: Mapping[str, Any]) -> Iterator[str]:
    for name, values in constants.items():
        given, value = found.get(name, _ABSENT), _all(values)[0]
        # PEFT turns new features off where an older folder lacks their field.
        if given is _ABSENT and value:
            yield f"{name!r} is missing, and method {declared.method!r} computes what PEFT does with {shown(value)}"
        elif given is not _ABSENT and not any(_same(given, each) for each in _all(values)) and (given or value):
            yield (
                f"{name!r} is {shown(given)}, and method {declared.method!r} computes what PEFT does with "
                f"{shown(value)}; merge the adapter in PEFT (merge_and_unload), if that method can be merged"
            )


def _all(values: Any) -> tuple[Any, ...]:
    """The values of PEFT's that a constant may have."""
    return values if isinstance(values, tuple) else (values,)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _same(first: object, second: object) -> bool:
    """Whether two values of JSON are equal: True is not 1."""
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def _unknown(found: Mapping[str, Any], declared: Declared) -> Iterator[str]:
    names = declared.names
    known = {*COMMON, *names.constants, *names.drawn, *names.training, *names.ignored}
    known |= {name for setting in names.settings.values() for name in setting.fields}
    if names.type == "LORA":
        known |= HARMLESS
        yield from changed_base(found)
        known.add("init_lora_weights")
    for name, value in found.items():
        if name in known or not value:
            continue
        if name in REFUSED:
            what, instead = REFUSED[name]
            yield f"{name!r} is {shown(value)}: {what}. tunerkit cannot hold that; {instead}"
        else:
            yield (
                f"{name!r} is {shown(value)}, which method {declared.method!r} does not name{closest(name, known)}. It "
                "may change what the adapter computes, so it is not ignored; delete it from the file if it does not"
            )


def replaced(names: Declaration, config: object) -> set[str]:
    """The settings in whose place the config has others; see `Setting.instead_of`."""
    used = (own for own in names.settings if getattr(config, own) is not None)
    return {names.settings[own].instead_of for own in used} - {""}


def written_settings(
    declared: Declared,
    config: object,
    sizes: Mapping[str, object],
    named: Callable[[Sequence[str]], Sequence[str] | str],
) -> dict[str, object]:
    """Return PEFT's settings of an adapter.

    Args:
        declared: The method, and its names.
        config: Its config.
        sizes: What the tensors say, for settings that are None, that tensors say or that have patterns.
        named: Gives PEFT's form of patterns of targets.

    Raises:
        ConfigError: PEFT has no value for one of the settings.
    """
    names, problems = declared.names, []
    constants = {name: _all(values)[0] for name, values in names.constants.items()}
    written: dict[str, object] = {"peft_type": names.type, **constants, **names.drawn, **names.training}
    for own, setting in names.settings.items():
        value = getattr(config, own)
        if own in replaced(names, config) or (setting.instead_of and value is None):
            value = 0
        elif setting.pattern or setting.measured or value is None:
            value = sizes.get(own, value)
        if value is None and setting.none is not NONE:
            value = setting.none
        if setting.targets:
            value = named(value or ())
        elif setting.values:
            theirs = [each for mine, each in setting.values if _same(mine, value)]
            if not theirs:
                allowed = ", ".join(shown(mine) for mine, _ in setting.values)
                problems.append(f"PEFT's {names.type} has {own} {allowed} only, got {shown(value)} @ $.{own}")
                continue
            value = theirs[0][0]
        written |= dict.fromkeys(setting.name, list(value) if isinstance(value, tuple) else value)
    if problems:
        raise ConfigError(problems)
    return written
