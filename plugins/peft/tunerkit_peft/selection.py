"""The modules that PEFT's settings name as targets: the same rule by which PEFT finds them in a model."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import attrs

from tunerkit.plugin import file_matchers

ALL_LINEAR: Final = "all-linear"
_NAME: Final = re.compile(r"\w+")


@attrs.frozen
class Selection:
    """What the settings say of where the adapter is. A value of a wrong type says nothing: the tensors say it too.

    Attributes:
        targets: ``target_modules``: ends of paths, or a regular expression for whole paths; None if nothing is said.
        excluded: ``exclude_modules``, in the same form.
        layers: ``layers_to_transform``; None for all.
        blocks: ``layers_pattern``: the names before a layer's number; empty for any.
        task: ``task_type``; may be empty.
        model_class: The class that was wrapped, where there is no task; may be empty.
    """

    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    layers: frozenset[int] | None
    blocks: tuple[str, ...]
    task: str
    model_class: str

    def matcher(self) -> Callable[[str], bool]:
        """Return a function that checks whether PEFT would adapt the module at a path.

        Raises:
            TargetError: A regular expression is malformed or takes too many steps, here or when the function is called.
        """
        targets, left_out = _matcher(self.targets or ()), _matcher(self.excluded)
        return lambda path: targets(path) and not left_out(path) and self._is_layer(path)

    def kinds(self, path: str) -> set[str]:
        """Return the names in ``targets`` by which a path is one; for an expression, its last part."""
        if isinstance(self.targets, tuple):
            return set(ends(path)) & set(self.targets)
        return {path.rpartition(".")[2]}

    def _is_layer(self, path: str) -> bool:
        """Whether a path is in one of the chosen layers. PEFT's versions read another number if there are several."""
        if self.layers is None or (isinstance(self.targets, tuple) and path in self.targets):
            return True
        parts = path.split(".")
        named = [name for name in self.blocks if _NAME.fullmatch(name)]
        numbers = [
            int(part)
            for place, part in enumerate(parts[:-1])
            if part.isdecimal() and (parts[place - 1] in named if named and place else place > 1)
        ]
        return bool(numbers) and {numbers[0], numbers[-1]} <= self.layers


def selection_of(found: Mapping[str, Any]) -> Selection:
    """Read it from the settings."""
    mapping = found.get("auto_mapping")
    layers = found.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    chosen = frozenset(each for each in numbers if isinstance(each, int) and not isinstance(each, bool))
    return Selection(
        targets=_names(found.get("target_modules")) or None,
        excluded=_names(found.get("exclude_modules")),
        layers=chosen or None,
        blocks=(blocks,) if isinstance(blocks := _names(found.get("layers_pattern")), str) else blocks,
        task=_text(found.get("task_type")),
        model_class=_text(mapping.get("base_model_class")) if isinstance(mapping, dict) else "",
    )


def ends(path: str) -> Iterator[str]:
    """Yield a path and all its ends, cut at dots."""
    while path:
        yield path
        path = path.partition(".")[2]


def _matcher(names: tuple[str, ...] | str) -> Callable[[str], bool]:
    if isinstance(names, str):
        return file_matchers([names])[names] if names else lambda path: False
    known = set(names)
    return lambda path: any(end in known for end in ends(path))


def _names(value: object) -> tuple[str, ...] | str:
    if isinstance(value, list):
        return tuple(each for each in value if isinstance(each, str) and each)
    return _text(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
