"""The settings of a type of PEFT's by the names that a method declares: read from PEFT's config, and written for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from tunerkit.errors import closest, shown
from tunerkit.plugin import ConfigError
from tunerkit_peft import fields
from tunerkit_peft.adapter_config import Common, changed_base, common_of, refuse
from tunerkit_peft.declaration import COMMON, NONE, Declared, Setting
from tunerkit_peft.values import Values

_ABSENT: Final = object()


@attrs.frozen
class TableSettings:
    """What the settings of such an adapter say.

    Attributes:
        common: What every adapter has.
        declared: The method, and its names.
        config: The settings of the method, but those that name targets.
        chosen: PEFT's values of the settings that name targets, by our names: ends of paths, or an expression.
        remarks: What the settings say and the adapter will not hold.
    """

    common: Common
    declared: Declared
    config: Mapping[str, object]
    chosen: Mapping[str, tuple[str, ...] | str]
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
    return TableSettings(common, declared, converted.config, converted.chosen, tuple(converted.remarks))


@attrs.define
class Converted:
    """PEFT's settings as those of a method, filled by `problems_of`."""

    config: dict[str, object] = attrs.field(factory=dict)
    chosen: dict[str, tuple[str, ...] | str] = attrs.field(factory=dict)
    remarks: list[str] = attrs.field(factory=list)

    def problems_of(self, found: Mapping[str, Any], declared: Declared) -> Iterator[str]:
        """Convert all settings, and yield what is wrong."""
        names = declared.names
        for own, setting in names.settings.items():
            yield from self._setting(found, own, setting)
        for name, value in names.constants.items():
            given = found.get(name, _ABSENT)
            # PEFT turns new features off where an older folder lacks their field.
            if given is _ABSENT and value:
                yield f"{name!r} is missing, and method {declared.method!r} computes what PEFT does with {shown(value)}"
            elif given is not _ABSENT and not _same(given, value) and (given or value):
                yield (
                    f"{name!r} is {shown(given)}, and method {declared.method!r} computes what PEFT does with "
                    f"{shown(value)}; merge the adapter in PEFT (merge_and_unload), if that method can be merged"
                )
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
            self.config[own] = value


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _same(first: object, second: object) -> bool:
    """Whether two values of JSON are equal: True is not 1."""
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def _unknown(found: Mapping[str, Any], declared: Declared) -> Iterator[str]:
    names = declared.names
    known = {*COMMON, *names.constants, *names.training, *names.ignored}
    known |= {name for setting in names.settings.values() for name in setting.name}
    if names.type == "LORA":
        known |= fields.HARMLESS
        yield from changed_base(found)
        known.add("init_lora_weights")
    for name, value in found.items():
        if name in known or not value:
            continue
        if name in fields.REFUSED:
            what, instead = fields.REFUSED[name]
            yield f"{name!r} is {shown(value)}: {what}. tunerkit cannot hold that; {instead}"
        else:
            yield (
                f"{name!r} is {shown(value)}, which method {declared.method!r} does not name{closest(name, known)}. It "
                "may change what the adapter computes, so it is not ignored; delete it from the file if it does not"
            )


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
        sizes: What the tensors agree on, for settings that are None.
        named: Gives PEFT's form of patterns of targets.

    Raises:
        ConfigError: PEFT has no value for one of the settings.
    """
    names, problems = declared.names, []
    written: dict[str, object] = {"peft_type": names.type, **names.constants, **names.training}
    for own, setting in names.settings.items():
        value = getattr(config, own)
        if value is None:
            value = sizes.get(own)
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
