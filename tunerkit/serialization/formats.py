"""The formats of other programs: which of them a path holds, and reading it through the plugin that knows it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.errors import PluginError, UnknownFormatError, closest, shown
from tunerkit.libraries import FOREIGN_FORMATS
from tunerkit.paths import few
from tunerkit.records import Factors, Foreign, Format
from tunerkit.serialization.header import is_ours
from tunerkit.serialization.safetensors_file import file_at, metadata_at

A = TypeVar("A")


def find_format(name: object) -> Format:
    """Return the format with this name. Raises `UnknownFormatError`, which names its distribution if it is known."""
    found = hooks.gather_formats()
    if isinstance(name, str) and name in found:
        return found[name]
    known = {each.format: each.distribution for each in FOREIGN_FORMATS}
    if isinstance(name, str) and name in known:
        raise UnknownFormatError(
            f"format {name!r} needs the distribution {known[name]}, which is not installed: pip install {known[name]}"
        )
    installed = few(sorted(found), shown=20) or "none (each is a separate distribution, such as tunerkit-peft)"
    raise UnknownFormatError(
        f"no format named {shown(name)}{closest(str(name), {*found, *known})}; installed: {installed}. tunerkit's own "
        "file is written by tunerkit.save"
    )


def format_at(path: str | os.PathLike[str]) -> Format | None:
    """Return the format of what lies at ``path``; None if a file of tunerkit's does, or nothing that is known."""
    place = file_at(path, "adapter")
    if is_ours(metadata_at(place)):
        return None
    return next((each for each in hooks.gather_formats().values() if sniffs(each, Path(path))), None)


def sniffs(each: Format, path: Path) -> bool:
    """Whether a format takes what lies at ``path`` for its own."""
    return bool(asked(each, "sniff", lambda: each.sniff(path)))


def read_foreign(source: Format, path: Path, model: nn.Module) -> Foreign:
    """Read an adapter of another program, and check that the plugin returned what its format declares."""
    found: Any = asked(source, "read", lambda: source.read(path, model))  # Any: the plugin may return anything
    if not isinstance(found, Foreign):
        raise PluginError(f"read of format {source.name!r} returned {shown(found)}; it must return a tunerkit.Foreign")
    fields = ("factors", "config", "tensors", "copies", "biases")
    wrong = [name for name in fields if not isinstance(getattr(found, name), Mapping)]
    if wrong or (found.tensors and found.tensors.keys() != found.factors.keys()):
        raise PluginError(
            f"read of format {source.name!r} returned a tunerkit.Foreign with {few(wrong, shown=5) or 'other paths'}; "
            "its fields must be mappings, and tensors must have the paths of factors, or none"
        )
    checked: Foreign = found
    return checked


def factors_at(found: Foreign, path: str, source: Format) -> Factors:
    """Return the product for one target, checked to be one."""
    product: Any = asked(source, "read", lambda: found.factors[path])  # Any: as above
    if not isinstance(product, Factors) or not all(map(_is_matrix, product)):
        raise PluginError(f"read of format {source.name!r} returned {shown(product)} for {path!r}; expected Factors")
    checked: Factors = product
    return checked


def asked(source: Format, function: str, call: Callable[[], A]) -> A:
    """Call a function of a plugin's format. Its errors keep their class and name the format."""
    try:
        return call()
    except Exception as error:
        error.add_note(f"raised by {function} of format {source.name!r}")
        raise


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()
